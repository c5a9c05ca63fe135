// The service as any client sees it: requests with the key, errors in its own words, streams of events.

const KEY = "raysd.key";
const PATIENCE = 3; // tries of what may be sent twice

class Problem extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    Object.assign(this, { status, retryAfter });
  }
}

/** The answer to a request; throws Problem for any but 2xx. `once` makes it safe to send twice. */
async function ask(method, path, body, { signal, once } = {}) {
  const headers = { "X-Raysd-User": user };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  if (once) headers["Idempotency-Key"] = once;
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body), cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service does not answer. Is it running?", 0);
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  const answer = await response.json().catch(() => ({}));
  const said = answer.error?.message ?? answer.detail ?? `The service answered ${response.status}.`;
  const after = Number(response.headers.get("Retry-After")) || null;
  return new Problem(after ? `${said}\nTry again in ${after} s.` : said, response.status, after);
}

/** `ask` for what must not be lost: again where the service was away or busy for a moment, and never kept twice. */
async function insist(method, path, body) {
  const once = randomName();
  for (let tries = 1; ; tries++) {
    try {
      return await ask(method, path, body, { once });
    } catch (error) {
      const passing = error.status === 0 || error.status === 503;
      if (!passing || tries === PATIENCE) throw error;
      await pause(1000 * (error.retryAfter ?? tries));
    }
  }
}

/** The data of server-sent events, one after the other. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter(line => line.startsWith("data:")).map(line => line.slice(5).trimStart());
        if (data.length && data[0] !== "[DONE]") yield JSON.parse(data.join("\n"));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A drawn picture, or null while there is none. */
async function pictureOf(generation, signal) {
  try {
    return await (await ask("GET", `/v1/generations/${encodeURIComponent(generation)}/picture`, null, { signal })).blob();
  } catch (error) {
    if (error.status === 404) return null;
    throw error;
  }
}

const blobOf = base64 => new Blob([Uint8Array.from(atob(base64), letter => letter.charCodeAt(0))], { type: "image/png" });

/** A name that nobody guesses; crypto.randomUUID wants https. */
const randomName = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), byte => byte.toString(16).padStart(2, "0")).join("");

const pause = (milliseconds, signal) => new Promise((resolve, reject) => {
  const timer = setTimeout(resolve, milliseconds);
  signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
});

/** What this browser keeps; nothing where it may keep nothing. */
const kept = {
  get(what, otherwise) {
    try {
      return JSON.parse(localStorage.getItem(`raysd.${what}`)) ?? otherwise;
    } catch {
      return otherwise;
    }
  },
  set(what, value) {
    try {
      localStorage.setItem(`raysd.${what}`, JSON.stringify(value));
    } catch { /* full, or forbidden */ }
  },
};

/** So that a person stays with one version of a model while its traffic is split. */
const user = kept.get("user", null) ?? randomName();
kept.set("user", user);
