// Showing things. Whatever came from a person or the service is set as text.

const $ = selector => document.querySelector(selector);
const SMALL = 256; // pixels; smaller pictures are shown with hard edges instead of blurred
const FADES = 350; // milliseconds, as in the style

function make(tag, values = {}, ...children) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
}

/** Tell those who do not see the page. */
const say = text => { $("#status").textContent = text; };

function complain(error) {
  if (error?.status === 401) wantKey();
  $("#alert").textContent = error?.message ?? "";
  $("#alert").hidden = !error;
}

/** Put a picture into a frame, once it can be shown whole. */
async function show(frame, blob, alt) {
  const picture = make("img", { src: URL.createObjectURL(blob), alt, className: "coming" });
  try {
    await picture.decode();
  } catch {
    throw new Problem("The picture that came cannot be shown.");
  } finally {
    URL.revokeObjectURL(picture.src);
  }
  picture.classList.toggle("small", Math.max(picture.naturalWidth, picture.naturalHeight) <= SMALL);
  frame.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
  frame.classList.remove("empty");
  const former = frame.querySelectorAll("img");
  frame.append(picture);
  setTimeout(() => former.forEach(image => image.remove()), FADES); // the new one comes over the former
}

function clear(frame) {
  frame.classList.add("empty");
  frame.querySelectorAll("img").forEach(image => image.remove());
}

/** How far a drawing is, and the seconds that it has taken. */
const progress = {
  place: $("#progress"),
  bar: $("#progress progress"),

  begin(frames) {
    this.began = performance.now();
    this.frames = frames;
    this.bar.removeAttribute("value");
    this.timer = setInterval(() => this.tick(), 100);
    this.tick();
    this.working(true);
  },
  at(done, of) {
    Object.assign(this.bar, { max: of, value: done });
  },
  end() {
    clearInterval(this.timer);
    this.working(false);
  },
  seconds() {
    return (performance.now() - this.began) / 1000;
  },
  tick() {
    $("#progress span").textContent = `${this.seconds().toFixed(1)} s`;
  },
  working(now) {
    this.place.hidden = !now;
    this.frames.forEach(frame => frame.classList.toggle("working", now));
  },
};
