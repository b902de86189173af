// Asking the server: the same API that every other client uses, with the key if the server wants one.

let key = sessionStorage.getItem("local_api_key") ?? ""; // the browser keeps it until the tab is closed

export const hasKey = () => Boolean(key);

export function setKey(typed) {
  key = typed;
  if (key) sessionStorage.setItem("local_api_key", key);
  else sessionStorage.removeItem("local_api_key");
}

/** Ask the API; returns the Response, or throws an Error with the API's sentence and, as `status`, its HTTP status. */
export async function api(path, { method = "GET", body, headers = {}, signal } = {}) {
  // A header takes Latin-1 only: the key's UTF-8 bytes are sent as they are, as other clients do.
  if (key) headers.Authorization = `Bearer ${String.fromCharCode(...new TextEncoder().encode(key))}`;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(`/v1/${path}`, { method, headers, signal, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const sentence = answer.error?.message ?? `The server answered with status ${response.status}.`;
  throw Object.assign(new Error(sentence), { status: response.status });
}

export const get = async (path) => (await api(path)).json();

/** Yield the chunks of a streamed answer: the JSON of each server-sent event. */
export async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const events = (rest + piece.value).split("\n\n");
    rest = events.pop();
    for (const event of events) if (event !== "data: [DONE]") yield JSON.parse(event.slice("data: ".length));
  }
}

export const KINDS = ["Fine-tuned model", "Base model", "Checkpoint"];
export const kindOf = (model) => KINDS[!model.startsWith("ft:") ? 1 : model.includes(":ckpt-step-") ? 2 : 0];
