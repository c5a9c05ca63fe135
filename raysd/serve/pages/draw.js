// One picture: drawn while one looks on, and shown with what it was drawn by.

const PREVIEWS = 3;
const frame = $("#picture");

async function draw(wanted, signal) {
  $("#drawn").hidden = true;
  clear(frame);
  progress.begin([frame]);
  say("Drawing");
  try {
    const body = { ...wanted, user, stream: true, partial_images: PREVIEWS };
    const done = await followed(await ask("POST", "/v1/images/generations", body, { signal }), wanted.prompt);
    const entry = { ...described(wanted), generation: done.generation, version: done.version, seed: done.seed };
    entry.seconds = progress.seconds();
    await show(frame, blobOf(done.b64_json), wanted.prompt);
    past.add(entry);
    showDetails(entry);
    say("The picture is done");
  } catch (error) {
    clear(frame);
    throw error;
  } finally {
    progress.end();
  }
}

/** Show previews as they come; the event of the whole picture. */
async function followed(response, prompt) {
  let done = null;
  for await (const event of events(response)) {
    if (event.type === "image_generation.completed") done = event;
    if (event.error) throw new Problem(event.error.message);
    if (event.type !== "image_generation.partial_image") continue;
    const count = event.partial_image_index + 1;
    progress.at(count, PREVIEWS + 1);
    say(`Preview ${count} of ${PREVIEWS}`);
    await show(frame, blobOf(event.b64_json), `Preview: ${prompt}`);
  }
  if (!done) throw new Problem("The connection ended before the picture was done. Try again.");
  return done;
}

/** What is remembered of a request: the form's own values. */
function described({ prompt, model, ...settings }) {
  return { prompt, model, settings, at: Date.now() };
}

function showDetails(entry) {
  const { settings } = entry;
  const facts = [entry.version ?? entry.model, `seed ${entry.seed}`, `${settings.num_inference_steps} steps`];
  if (entry.seconds) facts.push(`${entry.seconds.toFixed(1)} s`);
  $("#facts").textContent = facts.join(" · ");
  $("#caption").textContent = entry.prompt;
  $("#delete").textContent = "Delete";
  $("#drawn").hidden = false;
  showRating(entry);
}

/** Show a picture of the history again. */
async function reopen(entry) {
  location.hash = "#draw";
  complain(null);
  clear(frame);
  showDetails(entry);
  try {
    if (await fill(frame, entry)) return;
    past.remove(entry.generation);
    nothing();
  } catch (error) {
    complain(error);
  }
}

function nothing() {
  clear(frame);
  $("#drawn").hidden = true;
}

$("#save").addEventListener("click", async event => {
  event.preventDefault();
  const { entry } = rating;
  try {
    const blob = await pictureOf(entry.generation);
    if (!blob) throw new Problem("The picture is no longer kept.");
    const link = make("a", { href: URL.createObjectURL(blob), download: `${entry.generation}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    complain(error);
  }
});

// Asked once more, in place: the picture, its prompt and what was said of it go for good.
$("#delete").addEventListener("click", async event => {
  if (event.target.textContent === "Delete") {
    event.target.textContent = "Delete for good?";
    return;
  }
  try {
    await ask("DELETE", `/v1/generations/${encodeURIComponent(rating.entry.generation)}`);
    past.remove(rating.entry.generation);
    nothing();
    say("Deleted");
  } catch (error) {
    complain(error);
  }
});
$("#delete").addEventListener("blur", event => { event.target.textContent = "Delete"; });
