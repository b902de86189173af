// Putting things on the page. What comes from the server gets there through el(): as text, never as markup.

export const byId = (id) => document.getElementById(id);

/** Make an element: its properties are set one by one, its children become text or are elements already. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child || child === 0)); // `condition && el(…)` may be false
  return element;
}

const drawn = new WeakMap();

/** Fill `place` anew, if its data has changed, and leave the keyboard's focus where it was. */
export function show(place, data, build) {
  const now = JSON.stringify(data);
  if (drawn.get(place) === now) return;
  drawn.set(place, now);
  const focused = place.contains(document.activeElement) && document.activeElement.id;
  place.replaceChildren(...build(data).filter(Boolean));
  if (focused) byId(focused)?.focus();
}

/** Put a sentence into an element, or hide that; a screen reader may read out each change, so only if it is one. */
export function say(id, sentence) {
  if (byId(id).textContent !== sentence) byId(id).textContent = sentence;
  byId(id).hidden = !sentence;
}

export const time = (seconds, style) => new Date(seconds * 1000).toLocaleString(undefined, style);
export const date = (seconds) => time(seconds, { dateStyle: "medium", timeStyle: "short" });
export const duration = (seconds) =>
  seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
export const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
export const figure = (value) => (typeof value === "number" ? value.toFixed(3) : "–");
