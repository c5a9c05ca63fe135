// The form, the three views and the key.

const form = $("#ask");
const VIEWS = { draw: "Draw", compare: "Draw a pair", history: "" };
let busy = null; // what stops the drawing that is going on

/** The request that the form describes; fields that were left empty are the service's to choose. */
function wanted() {
  const values = Object.fromEntries(Object.entries(Object.fromEntries(new FormData(form))).filter(([, value]) => value.trim()));
  for (const field of ["num_inference_steps", "guidance_scale", "seed"]) {
    if (field in values) values[field] = Number(values[field]);
  }
  return values;
}

form.addEventListener("submit", async event => {
  event.preventDefault();
  if (busy) return;
  const work = document.body.dataset.view === "compare" ? drawPair : draw;
  busy = new AbortController();
  complain(null);
  setBusy(true);
  if (matchMedia("(max-width: 48rem)").matches) $("#stage").scrollIntoView();
  try {
    await work(wanted(), busy.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped");
    else complain(error);
  } finally {
    busy = null;
    setBusy(false);
  }
});

function setBusy(now) {
  $("#go").disabled = now;
  $("#go span").textContent = now ? "Drawing…" : VIEWS[document.body.dataset.view];
}

$("#stop").addEventListener("click", () => busy?.abort());
$("#again button").addEventListener("click", () => form.requestSubmit());

form.elements.prompt.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
});

form.addEventListener("input", () => {
  showValues();
  try {
    sessionStorage.setItem("raysd.form", JSON.stringify(Object.fromEntries(new FormData(form))));
  } catch { /* full, or forbidden */ }
});

function showValues() {
  for (const output of form.querySelectorAll("output")) output.textContent = $(`#${output.htmlFor}`).value;
}

function fillForm(values) {
  for (const [field, value] of Object.entries(values)) {
    if (form.elements[field]) form.elements[field].value = value;
  }
  showValues();
}

$("#reuse").addEventListener("click", () => {
  const { prompt, model, settings, seed } = rating.entry;
  fillForm({ negative_prompt: "", ...settings, prompt, model, seed: seed ?? "" });
  $("#settings").open = true;
  form.elements.prompt.focus();
});

$("#clear").addEventListener("click", () => {
  past.clear();
  showHistory();
});

function showView() {
  const view = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "draw";
  document.body.dataset.view = view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  for (const section of document.querySelectorAll("#stage > section")) section.hidden = section.id !== view;
  setBusy(busy !== null);
  complain(null);
  if (view === "history") showHistory();
}
addEventListener("hashchange", showView);

/** Ask for the key, in services that want one. */
function wantKey() {
  if (!$("#key")) return;
  sessionStorage.removeItem(KEY);
  locked(true);
  $("#key-field").focus();
}

function locked(now) {
  document.body.classList.toggle("locked", now);
  $("#key").hidden = !now;
  $("#forget-key").hidden = now;
}

$("#key")?.addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("#key-field").value.trim());
  $("#key-field").value = "";
  begin();
});

$("#forget-key")?.addEventListener("click", () => {
  wantKey();
  complain(null);
});

async function begin() {
  if ($("#key") && !sessionStorage.getItem(KEY)) return wantKey();
  try {
    const { data } = await (await ask("GET", "/v1/models")).json();
    form.elements.model.replaceChildren(...data.map(({ id }) => make("option", { value: id, textContent: id })));
    fillForm(JSON.parse(sessionStorage.getItem("raysd.form")) ?? {});
    complain(data.length ? null : new Problem("No model is served yet."));
  } catch (error) {
    return complain(error);
  }
  if ($("#key")) locked(false);
}

$("#settings").open = matchMedia("(min-width: 62rem) and (min-height: 57rem)").matches;
showValues();
showView();
begin();
