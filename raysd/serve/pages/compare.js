// Two versions, blind: both pictures come together, and who drew which is told after the choice.

const ASKS_EVERY = [300, 300, 500, 500, 800, 800, 1200]; // milliseconds; the last for ever
const LONGEST = 15 * 60; // seconds
const sides = { left: $(".pair [data-choice=left]"), right: $(".pair [data-choice=right]") };
let pair = null; // the one to be judged

async function drawPair(wanted, signal) {
  resetPair(wanted.prompt);
  progress.begin(Object.values(sides));
  say("Drawing two pictures");
  let both = [];
  try {
    const asked = await (await ask("POST", "/v1/comparisons", { ...wanted, user }, { signal })).json();
    both = [asked.left, asked.right];
    const seeds = await Promise.all(both.map(generation => drawn(generation, signal)));
    const blobs = await Promise.all(both.map(generation => pictureOf(generation, signal)));
    // Neither is shown before the other: which version is quicker would tell them apart.
    await Promise.all(["left", "right"].map((side, index) => show(sides[side], blobs[index], `${side} picture`)));
    pair = { left: asked.left, right: asked.right, entry: { ...described(wanted), seed: seeds[0] } };
    judge(true);
  } catch (error) {
    for (const generation of both) ask("POST", `${predictionOf(generation)}/cancel`).catch(() => {});
    throw error;
  } finally {
    progress.end();
  }
}

/** A generation is a picture of a prediction. */
const predictionOf = generation => `/v1/predictions/${encodeURIComponent(generation.replace(/-\d+$/, ""))}`;

/** Wait until a picture is drawn; its seed. */
async function drawn(generation, signal) {
  for (let tries = 0; progress.seconds() < LONGEST; tries++) {
    const now = await (await ask("GET", predictionOf(generation), null, { signal })).json();
    if (now.status === "succeeded") return now.generations[0].seed;
    if (!["starting", "processing"].includes(now.status)) throw new Problem(now.error ?? `The drawing was ${now.status}.`);
    await pause(ASKS_EVERY[Math.min(tries, ASKS_EVERY.length - 1)], signal);
  }
  throw new Problem("The pictures did not come. Try again.");
}

function resetPair(prompt) {
  pair = null;
  Object.values(sides).forEach(frame => (clear(frame), frame.classList.remove("chosen")));
  document.querySelectorAll(".reveal").forEach(place => place.replaceChildren());
  $("#pair-prompt").textContent = prompt;
  $("#pair-hint").hidden = $("#again").hidden = true;
  judge(false);
}

/** Whether a choice is asked for now. */
function judge(now) {
  $("#answers").hidden = !now;
  Object.values(sides).forEach(frame => { frame.disabled = !now; });
  if (!now) return;
  say("Both pictures are there. Left arrow, right arrow, or down arrow for no difference.");
  $("#compare").focus({ preventScroll: true }); // so that the arrows are not the prompt's
}

async function choose(choice) {
  if (!pair) return;
  const judged = pair;
  pair = null;
  judge(false);
  try {
    const { left, right } = judged;
    const versions = await (await insist("POST", "/v1/feedback", { pair: { left, right, choice } })).json();
    complain(null);
    reveal(judged, choice, versions);
  } catch (error) {
    pair = judged;
    judge(true);
    complain(error);
  }
}

function reveal(judged, choice, versions) {
  for (const [side, frame] of Object.entries(sides)) {
    const version = versions[side] ?? "";
    frame.classList.toggle("chosen", side === choice);
    frame.nextElementSibling.replaceChildren(version, make("small", { textContent: side === choice ? "your choice" : "" }));
    past.add({ ...judged.entry, generation: judged[side], version });
  }
  $("#again").hidden = false;
  $("#again button").focus({ preventScroll: true });
  say(`Left was ${versions.left}, right was ${versions.right}`);
}

document.querySelectorAll("#compare [data-choice]").forEach(button => {
  button.addEventListener("click", () => choose(button.dataset.choice));
});

document.addEventListener("keydown", event => {
  if (!pair || document.body.dataset.view !== "compare") return;
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  if (event.target.matches("input, textarea, select")) return;
  const button = $(`#answers [data-key="${CSS.escape(event.key)}"]`);
  if (!button) return;
  event.preventDefault();
  button.click();
});
