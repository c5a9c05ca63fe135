// The pictures that were drawn in this browser: what was asked for is kept here, the pictures by the service.

const MOST_KEPT = 60;

const past = {
  entries: kept.get("history", []),

  add(entry) {
    this.entries = [entry, ...this.entries.filter(other => other.generation !== entry.generation)].slice(0, MOST_KEPT);
    kept.set("history", this.entries);
  },
  /** After an entry was changed. */
  save() {
    kept.set("history", this.entries);
  },
  remove(generation) {
    this.entries = this.entries.filter(entry => entry.generation !== generation);
    kept.set("history", this.entries);
  },
  clear() {
    this.entries = [];
    kept.set("history", []);
  },
};

function showHistory() {
  const entries = past.entries;
  $("#history-about").textContent = entries.length
    ? "Drawn in this browser. The list is kept here, the pictures by the service."
    : "Nothing was drawn in this browser yet.";
  $("#clear").hidden = !entries.length;
  $(".gallery").replaceChildren(...entries.map(card));
}

function card(entry) {
  const frame = make("span", { className: "frame empty working" });
  const opened = make("button", { type: "button" }, frame,
    make("span", { className: "prompt", textContent: entry.prompt || "no prompt" }),
    make("span", { className: "quiet", textContent: entry.version ?? entry.model }));
  opened.addEventListener("click", () => reopen(entry));
  const item = make("li", {}, opened);
  new IntersectionObserver(async ([seen], observer) => {
    if (!seen.isIntersecting) return;
    observer.disconnect();
    await fill(frame, entry).catch(() => {});
    frame.classList.remove("working");
  }).observe(item);
  return item;
}

/** Fetch a former picture into a frame; false if it is gone. */
async function fill(frame, entry) {
  const blob = await pictureOf(entry.generation);
  if (blob) await show(frame, blob, entry.prompt);
  else frame.replaceChildren(make("span", { textContent: "no longer kept" }));
  return blob;
}
