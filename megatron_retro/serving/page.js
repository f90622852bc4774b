"use strict";

const SETTINGS = {{settings}};
const MODES = { on: "Retrieval on", off: "Off", random: "Random" };

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text, never markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function say(id, text, wrong = false) {
  byId(id).textContent = text;
  byId(id).classList.toggle("wrong", wrong);
}

/** An answer of the service; throws with the message of its error. */
async function ask(method, path, content, signal) {
  const headers = { "content-type": "application/json" };
  if (SETTINGS.key) headers.authorization = `Bearer ${byId("key").value}`;
  const body = content && JSON.stringify(content);
  const response = await fetch(path, { method, headers, body, signal });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new Error(answer?.error?.message ?? `the service answers ${response.status}`);
}

// ---------------------------------------------------------------- writing

let mode = SETTINGS.retrieval, shown = mode, running = null; // `shown` is the mode of the text in view

function showModes() {
  byId("modes").replaceChildren(...Object.entries(MODES).map(([name, title]) => {
    const button = element("button", { type: "button", value: name, "aria-pressed": mode === name }, title);
    button.disabled = !SETTINGS.reads && name !== "off";
    button.addEventListener("click", () => { mode = name; showModes(); });
    return button;
  }));
}

/** The events of a stream, parsed. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let buffer = "";;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the service has gone away");
    const lines = (buffer + value).split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write() {
  const given = byId("prompt").value, written = document.createTextNode("");
  const asked = {
    model: SETTINGS.model, prompt: given, retrieval: mode, stream: true, stream_options: { include_usage: true },
    max_tokens: byId("tokens").valueAsNumber || 16, temperature: byId("temperature").valueAsNumber || 0,
  };
  if (byId("seed").value) asked.seed = byId("seed").valueAsNumber;
  byId("text").replaceChildren(element("span", { class: "given" }, given), written);
  byId("reads").replaceChildren();
  byId("reads-note").textContent = mode === "off" ? "Retrieval is off." : "No chunk is complete yet.";
  shown = mode;
  running = new AbortController();
  setRunning(true);
  const start = performance.now();
  let tokens = 0, finish = null;
  try {
    const response = await ask("POST", "/v1/completions", asked, running.signal);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      for (const choice of event.choices) {
        written.data += choice.text;
        finish = choice.finish_reason ?? finish;
        choice.neighbors.forEach(showRead);
      }
      tokens = event.usage?.completion_tokens ?? tokens;
    }
    const seconds = (performance.now() - start) / 1000;
    const end = finish === "stop" ? "the document ends here" : "cut here";
    say("status", `${tokens} tokens in ${seconds.toFixed(1)} s; ${end}`);
  } catch (error) {
    if (error.name === "AbortError") say("status", "stopped");
    else say("status", error.message, true);
  }
  setRunning(false);
}

function setRunning(is) {
  if (is) say("status", "writing …");
  byId("write").disabled = is;
  byId("stop").disabled = !is;
  byId("text").classList.toggle("growing", is);
}

// ---------------------------------------------------------------- reading

function showRead({ chunk, text, neighbors }) {
  const cards = neighbors.map(neighborCard);
  byId("reads-note").textContent = "";
  byId("reads").append(element("li", { class: "read" },
    element("h3", {}, `Chunk ${chunk + 1}`),
    element("p", { class: "text chunk" }, text),
    cards.length ? element("ol", { class: "neighbors" }, ...cards) : element("p", { class: "soft" }, "No neighbor.")));
}

function neighborCard({ document: name, distance, text, continuation }) {
  const button = element("button", { type: "button", class: "small", "aria-label": `Remove ${name}` }, "Remove");
  button.addEventListener("click", () => remove(name));
  return element("li", { class: "panel neighbor", "data-document": name },
    element("div", { class: "head" },
      element("span", { class: "where" }, name),
      element("span", { class: "distance" }, shown === "random" ? "random" : `distance ${distance.toFixed(3)}`),
      button),
    element("p", { class: "text" },
      text, element("span", { class: "continuation", title: "what follows it in its document" }, continuation)));
}

// ---------------------------------------------------------------- documents

async function showDocuments() {
  const { data, removed } = await (await ask("GET", "/v1/documents")).json();
  byId("added").replaceChildren(...data.map(({ id }) => {
    const button = element("button", { type: "button", class: "small", "aria-label": `Remove ${id}` }, "Remove");
    button.addEventListener("click", () => remove(id));
    return element("li", {}, id, button);
  }));
  byId("removed").replaceChildren(...removed.map((id) => element("li", {}, id)));
}

/** Make a change, say what it was, and show the documents again. */
async function change(act) {
  try {
    say("changed", "…");
    const message = await act();
    await showDocuments();
    say("changed", message);
  } catch (error) {
    say("changed", error.message, true);
  }
}

const add = () => change(async () => {
  const { data } = await (await ask("POST", "/v1/documents", { text: byId("document").value })).json();
  byId("document").value = "";
  return `${data[0].id} was added`;
});

const remove = (name) => change(async () => {
  await ask("DELETE", `/v1/documents/${encodeURIComponent(name)}`);
  for (const card of document.querySelectorAll(".neighbor")) {
    if (card.dataset.document === name) {
      card.classList.add("gone");
      card.querySelector("button").disabled = true;
    }
  }
  byId("name").value = "";
  return `${name} was removed`;
});

function onSubmit(id, act) {
  byId(id).addEventListener("submit", (event) => { event.preventDefault(); act(); });
}

byId("model").textContent = document.title = SETTINGS.model;
byId("key-label").hidden = !SETTINGS.key;
byId("documents").hidden = !SETTINGS.reads;
showModes();
onSubmit("ask", write);
onSubmit("add", add);
onSubmit("remove", () => remove(byId("name").value.trim()));
byId("stop").addEventListener("click", () => running?.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("key").addEventListener("change", () => showDocuments().catch((error) => say("changed", error.message, true)));
if (SETTINGS.reads && !SETTINGS.key) showDocuments().catch((error) => say("changed", error.message, true));
