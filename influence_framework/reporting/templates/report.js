"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 10;
  const LONG = 480;

  // Text reaches the page by textContent alone, so that nothing in it is taken for markup.
  function make(tag, classes, text) {
    const element = document.createElement(tag);
    if (classes) element.className = classes;
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function put(parent, ...children) {
    for (const child of children) if (child) parent.append(child);
    return parent;
  }

  function described(what, point) {
    const said = [point.label, point.mark].filter((part) => part !== undefined).join(", ");
    return `${what} ${point.id}${said ? ": " + said : ""}`;
  }

  function picture(source, alt) {
    const image = make("img", "picture");
    image.alt = alt;
    image.loading = "lazy";
    image.decoding = "async";
    image.addEventListener("load", () => {
      if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.classList.add("pixels");
    });
    image.src = source;
    return image;
  }

  function flag(point) {
    return point.mark === undefined ? null : make("span", "flag", "⚑ " + point.mark);
  }

  function bar(width) {
    const track = make("span", "bar"), filled = make("span");
    track.setAttribute("aria-hidden", "true");
    filled.style.width = width + "%";
    return put(track, filled);
  }

  // Levels are one character a token: 0, 1 to 9 above zero, a to i below.
  function tokens(parts, levels) {
    const said = make("p", "said");
    parts.forEach((part, at) => {
      const code = levels ? levels.charCodeAt(at) : 48;
      const level = code >= 97 ? 96 - code : code - 48;
      if (!level) return said.append(part);
      const token = make("span", "token " + (level > 0 ? "up" : "down"), part);
      token.style.setProperty("--level", Math.abs(level));
      token.title = (level > 0 ? "helps" : "harms") + ", about " + Math.round(Math.abs(level) / 0.09) + " % of the largest here";
      said.append(token);
    });
    return said;
  }

  function text(item, levels) {
    const said = Array.isArray(item) ? tokens(item, levels) : make("p", "said", item);
    if (said.textContent.length <= LONG) return [said];
    const more = make("button", "more", "Show all");
    more.type = "button";
    said.classList.add("cut");
    more.addEventListener("click", () => {
      more.textContent = said.classList.toggle("cut") ? "Show all" : "Show less";
    });
    return [said, more];
  }

  // The button that colours the test point's tokens by what they add to its score with this training point.
  function button([place, , , , levels], picking) {
    if (!picking || levels === undefined) return null;
    const pick = make("button", "pick", "by this");
    pick.type = "button";
    pick.setAttribute("aria-pressed", "false");
    pick.setAttribute("aria-label", "Colour the test point by training point " + data.train[place].id);
    pick.addEventListener("click", () => picking.by(levels, pick));
    if (!picking.picked) picking.by(levels, pick);
    return pick;
  }

  // An entry is [place among the training points, score, width of its bar, levels of its tokens, levels of the test point's].
  function tile(entry, picking) {
    const [place, score, width] = entry;
    const point = data.train[place];
    const item = make("li", "tile" + (point.mark === undefined ? "" : " marked"));
    if (data.kinds.train === "picture") put(item, picture(point.item, described("Training point", point)));
    put(item, point.label === undefined ? null : make("span", "name", point.label), flag(point));
    return put(item, make("span", "id", "#" + point.id), make("span", "score", score), bar(width), button(entry, picking));
  }

  function passage(entry, picking) {
    const [place, score, width, levels] = entry;
    const point = data.train[place];
    const line = put(make("div", "line"), point.label === undefined ? null : make("span", "name", point.label), flag(point),
      make("span", "id", "#" + point.id), button(entry, picking), make("span", "score", score));
    return put(make("li", "text" + (point.mark === undefined ? "" : " marked")), line, bar(width), ...text(point.item, levels));
  }

  function list(entries, side, picking) {
    if (!entries.length) return make("p", "quiet", "none");
    if (data.kinds.train === "row") return table(null, [[side, entries]], picking);
    const texts = data.kinds.train === "text" || data.kinds.train === "tokens";
    const all = make("ol", (texts ? "texts " : "tiles ") + side);
    return put(all, ...entries.map((entry) => (texts ? passage : tile)(entry, picking)));
  }

  function row(point, score, classes, pick) {
    const line = make("tr", classes), head = make("th");
    head.scope = "row";
    put(head, make("span", "id", "#" + point.id + " "), point.label === undefined ? null : make("span", "name", point.label), " ", flag(point), pick);
    put(line, head, make("td", "score", score));
    for (const cell of point.item) put(line, make("td", "", cell));
    return line;
  }

  function table(test, sides, picking) {
    const all = make("table"), head = make("tr"), body = make("tbody");
    for (const name of ["", "score", ...data.columns]) {
      const cell = make("th", "", name);
      cell.scope = "col";
      put(head, cell);
    }
    if (test) put(body, row(test, "", "test"));
    for (const [side, entries, title] of sides) {
      if (title) {
        const cell = make("th", "", title), line = make("tr", "side " + side + "-side");
        cell.scope = "rowgroup";
        cell.colSpan = 2;
        put(body, put(line, cell));
      }
      for (const entry of entries) put(body, row(data.train[entry[0]], entry[1], side, button(entry, picking)));
    }
    const scroll = put(make("div", "scroll"), put(all, put(make("thead"), head), body));
    scroll.tabIndex = 0;
    scroll.setAttribute("role", "region");
    scroll.setAttribute("aria-label", "Training points as rows");
    return scroll;
  }

  function side(name, title, small, entries, level, picking) {
    const heading = put(make(level), make("span", "arrow", name === "helpful" ? "▲" : "▼"), title, " ", make("small", "", small));
    return put(make("div", name + "-side"), heading, list(entries, name, picking));
  }

  function shown(test, picking) {
    const told = put(make("div"), make("h3", "verdict", test.label === undefined ? "Test point " + test.id : test.label));
    if (test.label !== undefined) put(told, make("p", "quiet", "Test point " + test.id));
    put(told, test.mark === undefined ? null : put(make("p"), flag(test)));
    const kind = data.kinds.test, area = make("div", "shown");
    if (kind === "picture") put(area, picture(test.item, described("Test point", test)));
    put(area, told);
    if (kind === "text" || kind === "tokens") put(told, ...text(test.item));
    if (kind === "tokens") picking.said = [...told.children].find((part) => part.classList.contains("said"));
    return area;
  }

  function card(test) {
    const together = data.kinds.train === "row" && data.together;
    const wide = data.kinds.train === "text" || data.kinds.train === "tokens";
    const all = make("article", "card case" + (data.kinds.test === "picture" ? " pictured" : "") + (wide ? " texted" : ""));
    const picking = {
      by(levels, pick) {
        if (this.picked) this.picked.setAttribute("aria-pressed", "false");
        this.picked = pick;
        pick.setAttribute("aria-pressed", "true");
        this.said.replaceChildren(...tokens(test.item, levels).childNodes);
      },
    };
    put(all, shown(test, picking));
    if (data.kinds.test === "row" && !together) {
      const facts = make("p", "quiet said", test.item.map((cell, at) => data.test_columns[at] + " " + cell).join(" · "));
      put(all, facts);
    }
    if (data.kinds.train === "row") {
      const sides = [["helpful", test.up, "▲ " + data.sides[0][0]], ["harmful", test.down, "▼ " + data.sides[1][0]]];
      return put(all, table(together ? test : null, sides, picking));
    }
    return put(all, put(make("div", "sides"),
      side("helpful", ...data.sides[0], test.up, "h4", picking),
      side("harmful", ...data.sides[1], test.down, "h4", picking)));
  }

  for (const area of document.querySelectorAll("[data-rank]")) {
    const rank = data.ranks[area.dataset.rank];
    put(area, side(rank.side, rank.title, rank.small, rank.entries, "h3"));
  }

  const cases = document.getElementById("cases");
  if (!cases) return;
  const find = document.getElementById("find"), order = document.getElementById("order");
  const words = data.tests.map((test) => {
    const item = Array.isArray(test.item) ? test.item.join(data.kinds.test === "tokens" ? "" : " ") : test.item;
    const kept = data.kinds.test === "picture" ? "" : item || "";
    return [test.id, test.label || "", test.mark || "", kept].join(" ").toLowerCase();
  });
  const orders = {
    given: () => 0,
    helpful: (one, other) => data.tests[other].most - data.tests[one].most,
    harmful: (one, other) => data.tests[one].least - data.tests[other].least,
  };
  let chosen = [], page = 0;

  function show() {
    const last = Math.max(0, Math.ceil(chosen.length / PAGE) - 1);
    page = Math.min(Math.max(page, 0), last);
    const here = chosen.slice(page * PAGE, (page + 1) * PAGE);
    cases.replaceChildren(...here.map((at) => card(data.tests[at])));
    const range = `${page * PAGE + 1}–${page * PAGE + here.length} of ${chosen.length}`;
    for (const pager of document.querySelectorAll(".pager")) {
      const [before, told, after] = pager.children;
      told.textContent = chosen.length ? range : "No test point matches.";
      before.disabled = page === 0;
      after.disabled = page === last;
      before.onclick = () => turn(-1);
      after.onclick = () => turn(1);
      const needed = pager.classList.contains("below") ? chosen.length > PAGE : data.tests.length > PAGE || !chosen.length;
      pager.hidden = !needed;
    }
  }

  function turn(by) {
    page += by;
    show();
    document.getElementById("tests").scrollIntoView();
  }

  function choose() {
    const wanted = find.value.trim().toLowerCase();
    chosen = data.tests.map((_, at) => at).filter((at) => words[at].includes(wanted)).sort(orders[order.value]);
    page = 0;
    show();
  }

  find.addEventListener("input", choose);
  order.addEventListener("change", choose);
  choose();
})();
