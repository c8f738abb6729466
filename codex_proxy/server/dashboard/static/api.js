// Talks to the daemon: JSON there and back, streams of events, one place for errors and the session's token.

const BASE = "/ui/api";

// The old process closes its connection behind such an answer; the next one is made anew.
const RESTART_MS = 500;

/** An answer that was no success; `status` 0 when there was none. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null, retryAfter = null, param = null) {
    super(message);
    this.param = param;
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

let csrf = null;
let whenEnded = () => {};

/** Say what to do when the daemon does not know our session any more. */
export function onSessionEnd(job) {
  whenEnded = job;
}

/** Ask who we are; what changes things is signed with the token that comes with it. */
export async function session() {
  return keep(await call("GET", "/session"));
}

/** Open a session with a key. */
export async function signIn(key) {
  return keep(await call("POST", "/session", { key }));
}

export async function signOut() {
  await call("DELETE", "/session");
  csrf = null;
}

function keep(found) {
  csrf = found.csrf;
  return found;
}

export const get = (path, signal) => call("GET", path, undefined, signal);
export const post = (path, body = {}) => call("POST", path, body);
export const patch = (path, body) => call("PATCH", path, body);
export const remove = (path) => call("DELETE", path);

async function call(method, path, body, signal) {
  const response = await send(method, path, body, signal);
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", response.status, "no_json");
  }
}

/**
 * Send a request whose answer is a stream of events; *onEvent* is called with name and data of each.
 *
 * EventSource knows GET only.
 */
export async function stream(path, body, onEvent, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      let name = "message";
      const data = [];
      for (const line of frame.split("\n")) {
        if (line.startsWith("event:")) name = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
      }
      if (data.length > 0) onEvent(name, JSON.parse(data.join("\n")));
    }
  }
}

/** Send a request; one that the process before a restart got is asked again, and reaches the new one. */
async function send(method, path, body, signal) {
  try {
    return await sendOnce(method, path, body, signal);
  } catch (error) {
    if (error.status !== 503 || error.code !== "restarting") throw error;
  }
  await new Promise((resolve) => setTimeout(resolve, RESTART_MS));
  return sendOnce(method, path, body, signal);
}

async function sendOnce(method, path, body, signal) {
  const headers = { Accept: "application/json, text/event-stream" };
  if (method !== "GET" && csrf !== null) headers["x-csrf-token"] = csrf;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(BASE + path, {
      method, headers, signal,
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0, "unreachable");
  }
  if (response.ok) return response;
  let told = null;
  try {
    told = (await response.json()).error;
  } catch {
    // A relay's page, perhaps: the status has to do.
  }
  const retryAfter = Number.parseFloat(response.headers.get("retry-after") ?? "");
  const failure = new ApiError(
    told?.message ?? "", response.status, told?.code ?? null, Number.isNaN(retryAfter) ? null : retryAfter, told?.param ?? null,
  );
  if (response.status === 401 && path !== "/session") whenEnded();
  throw failure;
}
