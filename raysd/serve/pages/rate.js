// What a person thinks of the picture that is shown. Thumbs and stars are sent at once, the rest when it is whole.

const rating = $("#rate");
const SETTLES = 700; // milliseconds; stars are passed on the way to the one that is meant

function showRating(entry) {
  rating.reset();
  rating.entry = entry;
  $("#kept").textContent = "";
  $(".report").open = false;
  mark(entry);
}

function mark(entry) {
  for (const button of rating.querySelectorAll("[name=thumb]")) {
    button.setAttribute("aria-pressed", String(button.value === entry.thumb));
  }
  for (const star of rating.querySelectorAll("[name=stars]")) star.checked = Number(star.value) === entry.stars;
}

async function tell(entry, opinion) {
  try {
    await insist("POST", "/v1/feedback", { generation: entry.generation, ...opinion });
    complain(null);
    if (rating.entry === entry) $("#kept").textContent = "Kept, thank you";
    return true;
  } catch (error) {
    complain(error);
    return false;
  }
}

rating.addEventListener("click", async event => {
  const button = event.target.closest("[name=thumb]");
  const { entry } = rating;
  if (!button || entry.thumb === button.value) return;
  const former = entry.thumb;
  entry.thumb = button.value;
  mark(entry);
  if (!await tell(entry, { thumb: button.value })) entry.thumb = former;
  past.save();
  if (rating.entry === entry) mark(entry);
});

rating.addEventListener("change", event => {
  if (event.target.name !== "stars") return;
  const { entry } = rating;
  const stars = Number(event.target.value);
  entry.stars = stars;
  past.save();
  clearTimeout(entry.timer);
  const timer = setTimeout(() => tell(entry, { stars }), SETTLES);
  Object.defineProperty(entry, "timer", { value: timer, configurable: true, enumerable: false });
});

rating.addEventListener("submit", async event => {
  event.preventDefault();
  const values = new FormData(rating);
  const [tags, text] = [values.getAll("tags"), values.get("text").trim()];
  if (!tags.length && !text) return rating.elements.text.focus();
  if (await tell(rating.entry, { ...(tags.length && { tags }), ...(text && { text }) })) {
    rating.elements.text.value = "";
    for (const tag of rating.querySelectorAll("[name=tags]")) tag.checked = false;
  }
});

$("#send-report").addEventListener("click", async () => {
  const field = rating.elements.report;
  const reason = field.value.trim();
  if (!reason) return field.focus();
  if (await tell(rating.entry, { report: reason })) {
    field.value = "";
    $(".report").open = false;
  }
});

rating.elements.report.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  $("#send-report").click();
});
