"use strict";
// The page's theme and its browser of features. Text from data enters the page through text nodes alone.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

// Characters that cannot be seen or that turn the writing direction are written out.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const KNOWN = { "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00ad": "SHY", "\u200b": "ZWSP", "\u200c": "ZWNJ", "\u200d": "ZWJ",
  "\u200e": "LRM", "\u200f": "RLM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO",
  "\u202e": "RLO", "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\ufeff": "BOM" };

const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
const named = (character) => KNOWN[character] ?? code(character);

function pieces(text) {
  const parts = [];
  let from = 0;
  for (const match of text.matchAll(UNSEEN)) {
    parts.push(text.slice(from, match.index));
    parts.push(element("span", { class: "unseen", title: code(match[0]) }, named(match[0])));
    from = match.index + match[0].length;
  }
  return [...parts, text.slice(from)];
}

// White space alone is the token class "".
const chip = (token) =>
  token ? isolated(token, { class: "token" }) : element("span", { class: "token unseen" }, "white space");

// bdi: what is inside cannot turn the text around it.
const isolated = (text, attributes = {}) => element("bdi", attributes, ...pieces(text));
const plainly = (text) => text.replace(UNSEEN, named);

const number = (value, digits = 4) =>
  value === null ? "–" : value.toLocaleString("en", { maximumSignificantDigits: digits });
const percent = (share) =>
  share === null ? "–" : `${(100 * share).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;

// ----- theme ---------------------------------------------------------------------------------------------------

const THEMES = { "": "as the system", light: "light", dark: "dark" };

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  document.getElementById("theme").textContent = `Theme: ${THEMES[theme]}`;
}

function remember(theme) {
  try { localStorage.setItem("routesae-theme", theme); } catch { /* a page from disk may have no storage */ }
}

function remembered() {
  try { return localStorage.getItem("routesae-theme") ?? ""; } catch { return ""; }
}

document.getElementById("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(document.documentElement.dataset.theme ?? "") + 1) % names.length];
  setTheme(next);
  remember(next);
});
setTheme(remembered() in THEMES ? remembered() : "");

// ----- the list of features --------------------------------------------------------------------------------------

const ROWS_AT_ONCE = 100; // rows are made as the reader scrolls to them
const TOKENS_SHOWN = 5;

function browser(data) {
  const keys = ["latent", "frequency", "max", "layer", "tokens", "category", "score", "says"];
  const features = data.rows.map((row, place) => {
    const one = { place, metas: [] };
    keys.forEach((key, i) => { one[key] = row[i]; });
    // The latent's own number comes first, so that "12" finds 12 and 123 by it, and every text that has "12".
    one.words = [...one.tokens.map(plainly), one.says ?? "", one.category ?? ""].join("\n").toLowerCase();
    return one;
  });
  const byLatent = new Map(features.map((one) => [one.latent, one]));
  addMetaLatents(features, byLatent);
  const scored = document.getElementById("browser").dataset.scored === "yes";
  const body = document.querySelector("#rows tbody");
  const scroller = document.getElementById("rows");
  const search = document.getElementById("search");
  const sort = document.getElementById("sort");
  const direction = document.getElementById("direction");
  const panel = document.getElementById("detail");
  const links = () => [...body.querySelectorAll("a")];
  let view = features;
  let made = 0;
  let descending = true;
  let opened = null;

  function matches(one, words) {
    return words.every((word) => String(one.latent).startsWith(word) || one.words.includes(word) ||
      one.metas.some((meta) => word === `meta:${meta.number}`));
  }

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean).map(plainly).map((word) => word.toLowerCase());
    const key = sort.value;
    const order = descending ? -1 : 1;
    view = features.filter((one) => matches(one, words)).sort((a, b) => {
      if (a[key] === b[key]) return a.latent - b.latent;
      if (a[key] === null) return 1; // what is not known comes last in both orders
      if (b[key] === null) return -1;
      return order * (a[key] - b[key]);
    });
    const of = `${features.length.toLocaleString("en")} features`;
    document.getElementById("found").textContent =
      words.length ? `${view.length.toLocaleString("en")} of ${of}` : of;
    direction.textContent = descending ? "↓" : "↑";
    direction.setAttribute("aria-label", `Order: ${descending ? "descending" : "ascending"}`);
    for (const head of document.querySelectorAll("#rows th[data-key]")) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    body.replaceChildren();
    made = 0;
    scroller.scrollTop = 0;
    body.parentElement.setAttribute("aria-rowcount", view.length + 1);
    more();
  }

  function more() {
    const until = Math.min(view.length, made + ROWS_AT_ONCE);
    const rows = document.createDocumentFragment();
    for (; made < until; made++) rows.append(row(view[made], made));
    body.append(rows);
  }

  function row(one, place) {
    const tokens = element("td", { class: "tokens" });
    for (const token of one.tokens.slice(0, TOKENS_SHOWN)) tokens.append(chip(token), " ");
    const rest = one.tokens.length - TOKENS_SHOWN;
    if (rest > 0) tokens.append(element("span", { class: "more" }, `+${rest}`));
    if (one.says) tokens.append(element("span", { class: "says" }, isolated(one.says)));
    const link = element("a", { href: `#feature-${one.latent}` }, String(one.latent));
    link.setAttribute("aria-label", `Feature ${one.latent}`);
    const cells = [
      element("td", {}, link),
      tokens,
      element("td", { "data-name": "max" }, number(one.max)),
      element("td", { "data-name": "on" }, percent(one.frequency)),
      element("td", { "data-name": "layer" }, one.layer === null ? "–" : String(one.layer)),
    ];
    if (scored) cells.push(element("td", { "data-name": "score" }, one.score === null ? "–" : `${one.score}/5`));
    const made = element("tr", { "aria-rowindex": place + 2 }, ...cells);
    if (opened === one) choose(made);
    return made;
  }

  function choose(chosen) {
    for (const other of body.querySelectorAll(".chosen")) {
      other.classList.remove("chosen");
      other.querySelector("a").removeAttribute("aria-current");
    }
    if (!chosen) return;
    chosen.classList.add("chosen");
    chosen.querySelector("a").setAttribute("aria-current", "true");
  }

  // The link of a feature in the list; null where the search leaves it out or the list does not reach it yet
  // (making thousands of rows on the way to one would take seconds).
  function linkOf(one) {
    const place = view.indexOf(one);
    if (place < 0 || place >= made + ROWS_AT_ONCE) return null;
    if (place >= made) more();
    return body.children[place].querySelector("a");
  }

  function step(from, by) {
    const place = view.indexOf(from) + by;
    return place >= 0 && place < view.length ? view[place] : null;
  }

  // ----- one feature ---------------------------------------------------------------------------------------------

  const batches = new Map();

  function detailsOf(one) {
    const batch = Math.floor(one.place / data.at_once);
    if (!batches.has(batch)) batches.set(batch, JSON.parse(document.getElementById(`details-${batch}`).textContent));
    return batches.get(batch)[one.place % data.at_once];
  }

  function open(latent, focus) {
    const one = byLatent.get(latent);
    opened = one ?? null;
    choose(one ? linkOf(one)?.closest("tr") : null);
    document.getElementById("browser").classList.add("open");
    const title = element("h3", { class: "title", tabindex: "-1" }, `Feature ${latent}`);
    const back = element("button", { type: "button", id: "back" }, "Back to the list");
    back.addEventListener("click", close);
    panel.setAttribute("aria-label", `Feature ${latent}`);
    panel.replaceChildren(element("header", {}, title, back));
    if (one) panel.append(...shown(one, detailsOf(one), data, byLatent));
    else panel.append(element("p", { class: "note" }, "This latent is not among the features of this page."));
    panel.scrollTop = 0;
    if (focus) title.focus({ preventScroll: false });
  }

  function close() {
    document.getElementById("browser").classList.remove("open");
    const link = (opened && linkOf(opened)) ?? links()[0];
    location.hash = "#features";
    (link ?? search).focus();
  }

  function list(words) {
    search.value = words;
    update();
    document.getElementById("browser").classList.remove("open");
    // so that the same link works again, and the way back in the history does not lead here again
    location.replace("#features");
    search.focus();
  }

  function follow(focus) {
    const match = /^#feature-(\d+)$/.exec(location.hash);
    if (match) open(Number(match[1]), focus);
    if (match && !focus) document.getElementById("features").scrollIntoView();
    const [, meta] = /^#meta-(\d+)$/.exec(location.hash) ?? [];
    if (meta) list(`meta:${meta}`);
  }

  // ----- what the reader does --------------------------------------------------------------------------------------

  search.addEventListener("input", update);
  sort.addEventListener("change", () => {
    descending = !["latent", "layer"].includes(sort.value);
    update();
  });
  direction.addEventListener("click", () => { descending = !descending; update(); });
  for (const head of document.querySelectorAll("#rows th[data-key]")) {
    head.firstElementChild.addEventListener("click", () => {
      if (sort.value === head.dataset.key) descending = !descending;
      else { sort.value = head.dataset.key; descending = !["latent", "layer"].includes(sort.value); }
      update();
    });
  }
  document.querySelector("#list form").addEventListener("submit", (event) => event.preventDefault());
  body.addEventListener("click", (event) => { // the whole row, for the mouse
    const row = event.target.closest("tr");
    if (row && !event.target.closest("a") && !String(getSelection())) row.querySelector("a").click();
  });
  body.addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (!by || !row || event.ctrlKey || event.altKey || event.metaKey) return;
    const place = [...body.children].indexOf(row) + by;
    while (place >= made && made < view.length) more();
    body.children[place]?.querySelector("a").focus();
    event.preventDefault();
  });
  search.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown") { links()[0]?.focus(); event.preventDefault(); }
    if (event.key === "Escape") { search.value = ""; update(); }
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { close(); return; }
    const by = { j: 1, k: -1 }[event.key];
    if (!by || !opened || event.ctrlKey || event.altKey || event.metaKey) return;
    const next = step(opened, by);
    if (next) location.hash = `#feature-${next.latent}`;
  });
  window.addEventListener("hashchange", () => follow(true));
  // (the same link again changes no hash, but the narrow page may have gone back to its list)
  body.addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (link && link.hash === location.hash) follow(true);
  });
  const near = new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting) && made < view.length) {
      more();
      near.unobserve(end);
      near.observe(end); // reports again if it is still in sight
    }
  });
  const end = element("div", { id: "end", "aria-hidden": "true" });
  scroller.append(end);
  update();
  near.observe(end);
  follow(false);
}

// ----- parts of one feature ------------------------------------------------------------------------------------------

function shown(one, [layers, [counts, largest], kept, contexts, near], data, byLatent) {
  const parts = [];
  if (one.says || one.score !== null || one.category) {
    const told = [one.category, one.score === null ? null : `score ${one.score} of 5`].filter(Boolean).join(", ");
    parts.push(element("p", { class: "says" }, isolated(one.says ?? ""), one.says ? " " : ""));
    parts.push(element("p", { class: "hint" }, isolated(told)));
  }
  parts.push(element("ul", { class: "stats" },
    stat("Fires on", percent(one.frequency), " of tokens"),
    stat("Largest activation", number(one.max), ""),
    stat("Main layer", one.layer === null ? "–" : String(one.layer), "")));
  const charts = element("div", { class: "charts" });
  if (layers.length) charts.append(layerTable(layers));
  charts.append(histogram(counts, largest, kept));
  parts.push(charts, element("h4", {}, "Contexts"), element("p", { class: "hint" },
    `${contexts.length} of ${kept} kept, strongest first. The marked token is the one that activates the feature; ` +
    "the activations of the other tokens are not kept. 0 ", element("span", { class: "legend", "aria-hidden": "true" }),
    ` ${number(one.max)}`));
  parts.push(element("ol", { class: "contexts" }, ...contexts.map((context) => contextItem(context, one.max))));
  if (near.length) {
    parts.push(element("h4", {}, "Nearest by decoder direction"),
      element("p", { class: "hint" }, "Cosine similarity, among latents that fired. Those without a link have too few contexts to be features."),
      element("ul", { class: "near" }, ...near.map(([latent, cosine]) => neighbour(latent, cosine, byLatent))));
  }
  if (one.metas.length) {
    parts.push(element("h4", {}, "Meta-latents"),
      element("p", { class: "hint" }, "Parts of this feature's decoder direction, by the meta-SAE, and the features that share each most strongly."),
      element("ul", { class: "metas" }, ...one.metas.map((meta) => metaItem(one, meta, byLatent))));
  }
  return parts;
}

const stat = (name, value, after) => element("li", {}, `${name} `, element("strong", {}, value), after);

function layerTable(layers) {
  const norms = layers.every((layer) => layer[2] === null);
  const heads = norms ? ["Layer", "Share of the decoder's norms"]
    : ["Layer", "Share of its summed activation", "Active tokens", "of those routed here", "Mean activation"];
  const table = element("table", { class: "layers" },
    element("thead", {}, element("tr", {}, ...heads.map((text, i) => element("th", { scope: "col", class: i === 1 ? "bar" : "" }, text)))));
  const body = element("tbody");
  const top = Math.max(...layers.map((layer) => layer[1]), 1e-9);
  for (const [layer, share, active, rate, mean] of layers) {
    if (!share) continue;
    const fill = element("span", { class: "fill", "aria-hidden": "true" });
    fill.style.width = `${(60 * share) / top}%`;
    const cells = norms ? [] : [active === null ? "–" : active.toLocaleString("en"), percent(rate), number(mean, 3)];
    body.append(element("tr", {}, element("th", { scope: "row" }, String(layer)),
      element("td", { class: "bar" }, fill, ` ${percent(share)}`),
      ...cells.map((text) => element("td", {}, text))));
  }
  table.append(body);
  const silent = layers.filter((layer) => !layer[1]).map((layer) => layer[0]);
  return element("div", {}, element("h4", {}, "Layers"), table,
    element("p", { class: "hint" }, silent.length ? `Silent in layer${silent.length > 1 ? "s" : ""} ${silent.join(", ")}.` : ""));
}

function histogram(counts, largest, kept) {
  const most = Math.max(...counts, 1);
  const width = largest / counts.length;
  const text = counts.map((count, i) => [count, i]).filter(([count]) => count)
    .map(([count, i]) => `${number(i * width, 3)} to ${number((i + 1) * width, 3)}: ${count}`).join("; ");
  const bars = element("div", { class: "histogram", role: "img", "aria-label": `Kept contexts by activation. ${text}` });
  for (const count of counts) {
    const fill = element("i");
    fill.style.height = `${(80 * count) / most}%`;
    bars.append(element("div", {}, count ? String(count) : "", fill));
  }
  return element("div", {}, element("h4", {}, "Activations of its contexts"),
    element("p", { class: "hint" }, `Of the ${kept} kept contexts; activations below the threshold are not kept one by one.`),
    bars, element("div", { class: "axis", "aria-hidden": "true" }, element("span", {}, "0"),
      element("span", {}, "activation"), element("span", {}, number(largest, 3))));
}

function contextItem([before, token, after, activation, layer, p, document_, position], largest) {
  const mark = element("mark", {}, ...pieces(token));
  if (!token.trim()) mark.replaceChildren(...pieces(token.replaceAll(" ", "␣")));
  mark.style.setProperty("--share", Math.max(0, Math.min(1, activation / largest)));
  const about = [`activation ${number(activation, 3)}`];
  if (layer !== null) about.push(`layer ${layer}`);
  if (p !== null) about.push(`p ${number(p, 2)}`);
  about.push(`document ${document_}, token ${position}`);
  return element("li", {}, element("p", { dir: "auto" }, isolated(before), element("bdi", {}, mark), isolated(after)),
    element("p", { class: "about" }, about.join(" · ")));
}

function neighbour(latent, cosine, byLatent) {
  const one = byLatent.get(latent);
  const name = one ? element("a", { href: `#feature-${latent}` }, String(latent)) : String(latent);
  const tokens = one ? [" ", chip(one.tokens[0] ?? "")] : [];
  return element("li", {}, name, ` ${cosine.toFixed(2)}`, ...tokens);
}

const rows = document.getElementById("rows-data");
if (rows) browser(JSON.parse(rows.textContent));
