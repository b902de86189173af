// The playground: one question to two models, their answers side by side as they come.

import { api, chunks, kindOf, KINDS } from "./api.js";
import { byId, el, say, show } from "./elements.js";

const [modelA, modelB, system] = ["model-a", "model-b", "system"].map(byId);
let asking = null; // the AbortController of the question that is being answered
let toChoose = true; // the models are to be chosen: at the start, and when the address names one

export const playgroundOf = (model) => `#playground/${encodeURIComponent(model)}`;

/** Offer the models; at first a base model is chosen and one fine-tuned from it, the one with this id if there is. */
export function drawPlayground(state, id) {
  const names = state.models.map((model) => model.id);
  for (const select of [modelA, modelB]) {
    show(select, names, () => [select === modelB && el("option", { value: "" }, "none"),
      ...KINDS.map((kind) => el("optgroup", { label: kind }, ...names.filter((name) => kindOf(name) === kind)
        .map((name) => el("option", { value: name, selected: name === select.value }, name))))]);
  }
  if (!toChoose || !names.length) return;
  toChoose = false;
  const newest = names.find((name) => kindOf(name) === "Fine-tuned model") ?? "";
  const isBase = names.includes(id) && kindOf(id) === "Base model";
  modelB.value = names.includes(id) && !isBase ? id : newest;
  const base = isBase ? id : /^ft:(.*):local:/.exec(modelB.value)?.[1];
  if (names.includes(base)) modelA.value = base;
  modelB.onchange = () => suggestSystem(state);
  modelB.onchange();
}

/** Fill in the system prompt that model B was trained with: with another one a fine-tuned model knows less. */
async function suggestSystem({ jobs }) {
  const job = jobs.find((one) => one.fine_tuned_model && modelB.value.startsWith(one.fine_tuned_model));
  if (!job || (system.value && system.value !== system.dataset.suggested)) return; // the reader's own stays
  try {
    const head = await api(`files/${job.training_file}/content`, { headers: { Range: "bytes=0-65535" } });
    const { messages } = JSON.parse((await head.text()).split("\n")[0]);
    system.value = messages.find((message) => message.role === "system")?.content ?? "";
    system.dataset.suggested = system.value;
    say("system-source", system.value && "from the first example that model B was trained on");
  } catch { /* the file was deleted, or its first example is longer than what was read */ }
}

async function ask() {
  const question = byId("question").value.trim();
  if (asking || !byId("ask").reportValidity() || !question) return;
  const messages = [{ role: "system", content: system.value.trim() }, { role: "user", content: question }];
  const panels = [modelA.value, modelB.value].filter(Boolean).map((model) => ({
    model,
    text: el("p", { className: "text", "aria-live": "polite", "aria-busy": "true" }),
    figures: el("small", {}, "answering …"),
  }));
  byId("answers").prepend(el("h3", {}, question), el("div", { className: "pair" },
    ...panels.map(({ model, text, figures }) => el("article", { className: "card", "aria-label": model },
      el("h4", {}, kindOf(model), el("code", {}, model)), text, figures))));
  asking = new AbortController();
  byId("stop").disabled = false;
  const said = messages.filter((message) => message.content);
  await Promise.all(panels.map((panel) => answer(panel, said, asking.signal)));
  byId("stop").disabled = true;
  asking = null;
}

/** Stream one model's answer into its panel. */
async function answer({ model, text, figures }, messages, signal) {
  const started = performance.now();
  const temperature = byId("temperature").valueAsNumber, max_tokens = byId("max-tokens").valueAsNumber;
  let tokens = 0, end = "";
  try {
    const body = { model, messages, temperature, max_tokens, stream: true, stream_options: { include_usage: true } };
    const response = await api("chat/completions", { method: "POST", body, signal });
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      text.append(chunk.choices[0]?.delta.content ?? "");
      if (chunk.choices[0]?.finish_reason === "length") end = " · cut off at max tokens";
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    figures.textContent = `${tokens} tokens · ${((performance.now() - started) / 1000).toFixed(1)} s${end}`;
  } catch (error) {
    figures.textContent = signal.aborted ? "stopped" : error.message;
    figures.className = signal.aborted ? "" : "bad";
  }
  text.ariaBusy = "false";
}

byId("ask").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
byId("ask").addEventListener("keydown", (event) => {
  if (event.key === "Escape") asking?.abort();
  if (event.key === "Enter" && event.target.id === "question" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
});
byId("stop").addEventListener("click", () => asking?.abort());
system.addEventListener("input", () => say("system-source", "")); // now it is the reader's own
addEventListener("hashchange", () => { toChoose ||= location.hash.startsWith(playgroundOf("")); });
