"use strict";

const byId = (id) => document.getElementById(id);
const count = (number) => number.toLocaleString("en-US");
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** An element with attributes and children; strings become text, never markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

async function unpack() {
  const bytes = Uint8Array.from(atob(byId("data").textContent), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

// ---------------------------------------------------------------- figures

function figurePanel([title, rows]) {
  const list = element("dl");
  for (const [name, value] of rows) {
    list.append(element("dt", {}, name), element("dd", value === "not measured" ? { class: "missing" } : {}, value));
  }
  return element("div", { class: "panel" }, element("h2", {}, title), list);
}

function shape(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Bars over equal intervals; a bar that stands for anything is at least two pixels high. */
function histogramPanel({ title, note, counts, ranges, ticks }) {
  const height = 140, highest = Math.max(1, ...counts);
  const bars = counts.map((value, bar) => {
    const tall = value && Math.max(2, (value / highest) * height);
    return shape("g", {},
      shape("title", {}, `${ranges[bar]}: ${plural(value, "chunk")}`),
      shape("rect", { class: "slot", x: bar, y: 0, width: 1, height }),
      shape("rect", { class: "bar", x: bar + 0.07, y: height - tall, width: 0.86, height: tall }));
  });
  const svg = shape("svg", {
    viewBox: `0 0 ${counts.length} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${note}`,
  }, ...bars);
  return element("div", { class: "panel" },
    element("h2", {}, title), element("p", { class: "soft" }, note),
    element("figure", {},
      element("div", { class: "ticks" }, plural(highest, "chunk")), svg,
      element("div", { class: "ticks" }, ...ticks.map((tick) => element("span", {}, tick)))));
}

function mixPanel({ corpora, shares, database }) {
  const cells = (row) => row.map((share) => {
    const cell = element("td", { class: "share" }, `${(share * 100).toFixed(share && share < 0.01 ? 1 : 0)}%`);
    cell.style.setProperty("--share", share);
    return cell;
  });
  const body = element("tbody", {}, ...shares.map((row, number) =>
    element("tr", {}, element("th", { scope: "row" }, corpora[number]), ...cells(row))));
  body.append(element("tr", {}, element("th", { scope: "row" }, "the database"), ...cells(database)));
  const head = element("tr", {}, element("th", { scope: "col" }, "chunks of"),
    ...corpora.map((name) => element("th", { scope: "col" }, name)));
  return element("div", { class: "panel" }, element("h2", {}, "Where neighbors come from"),
    element("p", { class: "soft" }, "Each row adds up to 100%; the last one is what the database holds."),
    element("div", { class: "scroll" }, element("table", {}, element("thead", {}, head), body)));
}

// ---------------------------------------------------------------- chunks

class Chunks {
  constructor(data) {
    this.data = data;
    this.order = new Map(data.shown.map((id, row) => [id, row]));
    this.haystack = new Map(data.shown.map((id) => [id, this.text(id).toLowerCase()]));
  }

  has(id) { return this.order.has(id); }
  text(id) { return this.data.texts[id][4]; }
  document(id) { const [corpus, number] = this.data.texts[id]; return `${this.data.mix.corpora[corpus]}:${number}`; }
  place(id) { const [, , place, all] = this.data.texts[id]; return `chunk ${count(place + 1)} of ${count(all)}`; }
  fraction(id) { const [, , place, all] = this.data.texts[id]; return `${place + 1}/${all}`; }

  snippet(id, typed) {
    const begin = Math.max(0, this.haystack.get(id).indexOf(typed.trim().toLowerCase()) - 30);
    return (begin ? "…" : "") + this.text(id).slice(begin, begin + 160);
  }

  isFirst(id) { return this.data.texts[id][2] === 0; }
  isLast(id) { const [, , place, all] = this.data.texts[id]; return place + 1 === all; }

  /** [{id, distance, run, own: [begin, end], near: [begin, end]}], nearest first. */
  neighbors(id) {
    return this.data.neighbors[this.order.get(id)].map(([near, distance, run, ...cut]) =>
      ({ id: near, distance, run, own: cut.slice(0, 2), near: cut.slice(2) }));
  }

  /** Those of `ids` whose text holds the words typed, or whose document is named; a whole document id names only its own. */
  matching(ids, typed) {
    const words = typed.trim().toLowerCase();
    const named = ids.filter((id) => this.document(id).toLowerCase() === words);
    if (!words || named.length) return words ? named : ids;
    return ids.filter((id) => this.haystack.get(id).includes(words) || this.document(id).toLowerCase().startsWith(words));
  }
}

function marked(text, [begin, end]) {
  return [text.slice(0, begin), element("mark", {}, text.slice(begin, end)), text.slice(end)];
}

function shared({ distance, run }) {
  return `distance ${distance.toFixed(3)} · ${plural(run, "token")} shared`;
}

function ownText(chunks, id, neighbor) {
  const text = chunks.text(id);
  return neighbor && neighbor.run ? marked(text, neighbor.own) : [text];
}

function neighborCard(chunks, neighbor, rank) {
  const { id, run } = neighbor;
  const where = chunks.has(id)
    ? element("a", { class: "where", href: `#chunk-${id}` }, chunks.document(id))
    : element("span", { class: "where" }, chunks.document(id));
  const card = element("li", { class: "panel neighbor", tabindex: "0" },
    element("div", { class: "head" },
      element("span", { class: "rank" }, `${rank}`), where, element("span", { class: "soft" }, chunks.place(id)),
      element("span", { class: "facts" }, shared(neighbor))),
    element("div", { class: "text" }, ...(run ? marked(chunks.text(id), neighbor.near) : [chunks.text(id)])));
  card.append(element("p", { class: "label" }, "Continuation"));
  card.append(chunks.isLast(id)
    ? element("p", { class: "soft" }, "none: the document ends here")
    : element("div", { class: "text beside" }, chunks.text(id + 1)));
  return card;
}

/** The chunk with its left context, and its neighbors; the run shared with the neighbor at hand is marked in both. */
function chunkView(chunks, id) {
  const neighbors = chunks.neighbors(id);
  const own = element("div", { class: "text" }, ...ownText(chunks, id, neighbors[0]));
  const query = element("div", { class: "panel query" }, element("p", { class: "label" }, "Left context"));
  query.append(
    chunks.isFirst(id)
      ? element("p", { class: "soft" }, "nothing: the document begins here")
      : element("div", { class: "text beside" }, chunks.text(id - 1)),
    element("p", { class: "label" }, "Chunk"), own);
  const cards = neighbors.map((neighbor, number) => neighborCard(chunks, neighbor, number + 1));
  cards.forEach((card, number) => {
    const take = () => {
      own.replaceChildren(...ownText(chunks, id, neighbors[number]));
      cards.forEach((other) => other.classList.toggle("active", other === card));
    };
    card.addEventListener("mouseenter", take);
    card.addEventListener("focusin", take);
  });
  if (cards.length) cards[0].classList.add("active");
  const beside = [["previous", id - 1], ["following", id + 1]].filter(([word, other]) =>
    chunks.has(other) && !(word === "previous" ? chunks.isFirst(id) : chunks.isLast(id)));
  const title = element("div", { class: "title" },
    element("h2", { tabindex: "-1" }, chunks.document(id)),
    element("span", { class: "soft" }, `${chunks.place(id)}, id ${id}`),
    ...beside.map(([word, other]) => element("a", { href: `#chunk-${other}` }, `${word} chunk`)));
  const list = cards.length
    ? element("ol", { class: "neighbors" }, ...cards)
    : element("p", { class: "soft" }, "No neighbor: the database has no chunk of another document.");
  return [title, element("div", { class: "pair" }, query, list)];
}

// ---------------------------------------------------------------- browser

const LISTS = {
  all: ["All", ""],
  overlap: ["Largest overlap", "Chunks that share the longest run with their nearest neighbor."],
  few: ["Fewest neighbors", "Chunks with fewer neighbors than were asked for."],
  far: ["Farthest", "Chunks whose nearest neighbor is farthest away."],
};

function startBrowser(data) {
  const chunks = new Chunks(data), ids = { all: data.shown, ...data.hard };
  let list = "all", visible = [], shown = null, items = new Map();

  /** A line of the list; its text begins shortly before what was searched for. */
  function listItem(id) {
    const [nearest] = chunks.neighbors(id);
    const facts = nearest ? shared(nearest) : "no neighbor";
    const link = element("a", { href: `#chunk-${id}` },
      element("div", { class: "head" },
        element("b", {}, chunks.document(id)), element("span", {}, chunks.fraction(id))),
      element("div", { class: "facts" }, facts),
      element("div", { class: "snippet" }, chunks.snippet(id, byId("search").value)));
    items.set(id, link);
    return element("li", {}, link);
  }

  function fill() {
    visible = chunks.matching(ids[list], byId("search").value);
    items = new Map();
    byId("results").replaceChildren(...visible.map(listItem));
    byId("results").scrollTop = 0;
    const about = visible.length || byId("search").value ? LISTS[list][1] : "There are none.";
    byId("count").textContent = `${plural(visible.length, "chunk")}. ${about}`;
    for (const button of byId("lists").children) button.setAttribute("aria-pressed", button.value === list);
    highlight();
  }

  function highlight() {
    for (const link of byId("results").querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
    const link = items.get(shown), box = byId("results");
    if (link) {
      link.setAttribute("aria-current", "true");
      const { top, bottom } = link.getBoundingClientRect(), frame = box.getBoundingClientRect();
      if (top < frame.top) box.scrollTop -= frame.top - top;
      else if (bottom > frame.bottom) box.scrollTop += bottom - frame.bottom;
    }
    const place = visible.indexOf(shown);
    byId("previous").disabled = !visible.length || place === 0;
    byId("next").disabled = !visible.length || place === visible.length - 1;
  }

  function show(id) {
    shown = id;
    byId("chunk").replaceChildren(...chunkView(chunks, id));
    document.title = `${chunks.document(id)} · ${data.name}`;
    highlight();
    const article = document.querySelector("article"), { top } = article.getBoundingClientRect();
    if (top < 0 || top > innerHeight * 0.7) article.scrollIntoView();
  }

  function go(step) {
    const place = visible.indexOf(shown), next = place < 0 ? visible[0] : visible[place + step];
    if (next === undefined) return;
    history.replaceState(null, "", `#chunk-${next}`);
    show(next);
  }

  function showHash() {
    const id = Number(location.hash.replace("#chunk-", ""));
    const inside = byId("chunk").contains(document.activeElement);
    if (location.hash && chunks.has(id)) show(id);
    if (inside) byId("chunk").querySelector("h2").focus({ preventScroll: true });
    return shown !== null;
  }

  function press(event) {
    const inList = byId("results").contains(document.activeElement), typing = document.activeElement === byId("search");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/" && !typing) byId("search").focus();
    else if (event.key === "Escape" && typing) { byId("search").value = ""; fill(); byId("search").blur(); }
    else if (!typing && ["j", "ArrowRight"].includes(event.key)) go(1);
    else if (!typing && ["k", "ArrowLeft"].includes(event.key)) go(-1);
    else if ((inList || typing) && event.key === "ArrowDown") go(1);
    else if ((inList || typing) && event.key === "ArrowUp") go(-1);
    else return;
    event.preventDefault();
  }

  for (const [name, [title]] of Object.entries(LISTS)) {
    const button = element("button", { type: "button", value: name }, `${title} ${count(ids[name].length)}`);
    button.addEventListener("click", () => {
      list = name;
      fill();
      if (!visible.includes(shown)) go(0);
    });
    byId("lists").append(button);
  }
  byId("search").addEventListener("input", fill);
  byId("previous").addEventListener("click", () => go(-1));
  byId("next").addEventListener("click", () => go(1));
  addEventListener("hashchange", showHash);
  addEventListener("keydown", press);
  fill();
  if (!showHash() && visible.length) {
    shown = visible[0];
    byId("chunk").replaceChildren(...chunkView(chunks, shown));
    highlight();
  }
}

function leadText({ shown, sampled, num_chunks: all, chunk_length: length }) {
  const page = shown.length < all
    ? `The page holds ${count(shown.length)} of ${count(all)} chunks: a random sample, nearest neighbors of these, and every chunk on the lists.`
    : `The page holds all ${count(all)} chunks.`;
  const figures = sampled < all ? ` The distributions and the lists come from a random ${count(sampled)} of them.` : "";
  return `${page}${figures} A chunk is ${length} tokens; its neighbors are the nearest chunks of other documents, and a neighbor's continuation is the chunk that follows it.`;
}

unpack().then((data) => {
  document.querySelector("main").hidden = false;
  byId("name").textContent = document.title = data.name;
  byId("lead").textContent = leadText(data);
  byId("figures").append(...data.figures.map(figurePanel));
  byId("distributions").append(...data.histograms.map(histogramPanel));
  if (data.mix.corpora.length > 1) byId("distributions").append(mixPanel(data.mix));
  startBrowser(data);
}).catch((error) => {
  byId("lead").textContent = `This page cannot be shown here (${error}); it needs a browser of 2023 or later.`;
  throw error;
});
