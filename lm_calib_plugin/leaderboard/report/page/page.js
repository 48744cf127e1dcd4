"use strict";
(() => {
  const root = document.documentElement;
  const one = (query, at = document) => at.querySelector(query);
  const all = (query, at = document) => [...at.querySelectorAll(query)];
  const form = one("#filters");
  const pairForm = one("#pair-filters");
  const tables = all("#entries, #pairs");
  const attributes = ["model", "level", "method", "calibration", "role"];
  root.classList.add("js");
  for (const hidden of [form, pairForm, one("#theme"), ...all(".toggle, .copy")]) {
    if (hidden) hidden.hidden = false;
  }

  // Every table body with its rows in the order of the file, each with the row that unfolds.
  const bodies = tables.flatMap((table) => [...table.tBodies]).map((body) => ({
    body,
    rows: all("tr.row", body).map((row, place) => {
      const next = row.nextElementSibling;
      const more = next && next.classList.contains("more") ? next : null;
      if (more) {
        more.hidden = true;
        one("details", more).open = true;
      }
      return { row, more, place, first: row.classList.contains("dense") };
    }),
  }));
  const sorted = new Map(); // table -> {key, direction}

  // Columns.
  const boxes = all('input[name="column"]');
  const usual = new Map(boxes.map((box) => [box.value, box.defaultChecked]));
  function showColumns() {
    for (const box of boxes) {
      for (const cell of all(`#entries [data-c="${box.value}"]`)) cell.hidden = !box.checked;
    }
  }

  // Sorting: stable, within a body; numbers as numbers, missing ones last, dense first.
  function sort(table, key, direction) {
    const heads = all("th[data-kind]", table);
    const head = heads.find((each) => each.dataset.c === key);
    for (const each of heads) each.removeAttribute("aria-sort");
    if (head) head.setAttribute("aria-sort", direction);
    sorted.set(table, head ? { key, direction } : null);
    const sign = direction === "descending" ? -1 : 1;
    const value = ({ row }) => {
      const cell = one(`[data-c="${key}"]`, row);
      return cell && "v" in cell.dataset ? cell.dataset.v : null;
    };
    const compare = (a, b) => {
      if (a.first !== b.first) return a.first ? -1 : 1;
      if (head) {
        const [x, y] = [value(a), value(b)];
        if ((x === null) !== (y === null)) return x === null ? 1 : -1;
        if (x !== null) {
          const found = head.dataset.kind === "number"
            ? number(x) - number(y)
            : x.localeCompare(y, "en", { numeric: true });
          if (found) return sign * found;
        }
      }
      return a.place - b.place;
    };
    for (const { body, rows } of bodies) {
      if (!table.contains(body)) continue;
      const fragment = document.createDocumentFragment();
      for (const { row, more } of [...rows].sort(compare)) {
        fragment.append(row);
        if (more) fragment.append(more);
      }
      body.append(fragment);
    }
  }
  function number(text) {
    return text === "inf" ? Number.MAX_VALUE : text === "-inf" ? -Number.MAX_VALUE : Number(text);
  }
  function turn(table, head) {
    const first = one("button", head).dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const now = head.getAttribute("aria-sort");
    if (now === null) sort(table, head.dataset.c, first);
    else if (now === first) sort(table, head.dataset.c, other);
    else sort(table, "", "");
  }

  // Filters.
  function wanted(data, words) {
    if (attributes.some((name) => form[name].value && data[name] !== form[name].value
        && !(data.role === "dense" && name !== "model" && name !== "role" && name !== "level"))) {
      return false;
    }
    if (form.hide.checked && (data.role === "data-free" || data.role === "null")) return false;
    return words.every((word) => (data.words || "").includes(word));
  }
  function wantedPair(data) {
    return (!pairForm.task.value || data.task === pairForm.task.value)
      && (!pairForm.against.value || data.against === pairForm.against.value)
      && (!pairForm.resolved.checked || data.resolved === "1");
  }
  function filter() {
    const words = form.q.value.toLowerCase().split(/\s+/).filter(Boolean);
    const counts = new Map(tables.map((table) => [table.id, [0, 0]]));
    for (const { body, rows } of bodies) {
      const table = body.closest("table");
      let shown = 0;
      for (const { row, more } of rows) {
        const pair = table.id === "pairs";
        const fits = wanted(row.dataset, words) && (!pair || wantedPair(row.dataset));
        row.hidden = !fits;
        if (more) more.hidden = !fits || one(".toggle", row).getAttribute("aria-expanded") !== "true";
        shown += fits;
      }
      body.hidden = !shown;
      counts.get(table.id)[0] += shown;
      counts.get(table.id)[1] += rows.length;
    }
    tell(one(".count", form), counts.get("entries"), "rows", one("#nothing"));
    if (pairForm) tell(one(".count", pairForm), counts.get("pairs"), "comparisons", one("#no-pairs"));
    for (const part of all("figure, #varies tr.row")) {
      const { model, level } = part.dataset;
      part.hidden = Boolean((form.model.value && model !== form.model.value)
        || (form.level.value && level && level !== form.level.value));
    }
    for (const kind of all(".kind")) kind.hidden = !one("figure:not([hidden])", kind);
  }
  function tell(output, [shown, total], what, nothing) {
    output.textContent = shown === total ? `${total} ${what}` : `${shown} of ${total} ${what}`;
    nothing.hidden = shown > 0;
  }

  // The state stands in the address, so that a view can be shared.
  const usualTask = pairForm ? (one("option[data-default]", pairForm) || { value: "" }).value : "";
  function write() {
    const state = new URLSearchParams();
    for (const name of ["q", ...attributes]) if (form[name].value) state.set(name, form[name].value);
    if (form.hide.checked) state.set("hide", "controls");
    for (const [table, prefix] of tables.map((each) => [each, each.id === "pairs" ? "pair-" : ""])) {
      const now = sorted.get(table);
      if (now) state.set(`${prefix}sort`, `${now.key}.${now.direction}`);
    }
    const changed = boxes.filter((box) => box.checked !== usual.get(box.value));
    if (changed.length) state.set("columns", changed.map((box) => box.value).join("."));
    if (pairForm) {
      if (pairForm.task.value !== usualTask) state.set("task", pairForm.task.value || "all");
      if (pairForm.against.value) state.set("against", pairForm.against.value);
      if (pairForm.resolved.checked) state.set("resolved", "1");
    }
    const hash = state.toString();
    try {
      history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
    } catch {
      location.hash = hash;
    }
  }
  function read() {
    const hash = location.hash.slice(1);
    if (hash && !hash.includes("=")) return; // a place in the page
    const state = new URLSearchParams(hash);
    form.q.value = state.get("q") || "";
    for (const name of attributes) choose(form[name], state.get(name) || "");
    form.hide.checked = state.get("hide") === "controls";
    const changed = (state.get("columns") || "").split(".");
    for (const box of boxes) box.checked = usual.get(box.value) !== changed.includes(box.value);
    if (pairForm) {
      const task = state.get("task");
      choose(pairForm.task, task === null ? usualTask : task === "all" ? "" : task);
      choose(pairForm.against, state.get("against") || "");
      pairForm.resolved.checked = state.get("resolved") === "1";
    }
    for (const table of tables) {
      const [key, direction] = (state.get(table.id === "pairs" ? "pair-sort" : "sort") || ".").split(".");
      sort(table, key, direction === "descending" ? "descending" : "ascending");
    }
    menuOfSorting();
    showColumns();
    filter();
  }
  function choose(select, value) {
    select.value = [...select.options].some((option) => option.value === value) ? value : "";
  }
  function menuOfSorting() {
    const now = sorted.get(one("#entries"));
    if (form.sort) choose(form.sort, now ? now.key : "");
  }

  form.addEventListener("input", (event) => {
    if (event.target.name === "sort") {
      const head = one(`#entries th[data-c="${event.target.value}"]`);
      sort(one("#entries"), event.target.value, head ? one("button", head).dataset.first : "");
    }
    showColumns();
    filter();
    write();
  });
  if (pairForm) pairForm.addEventListener("input", () => { filter(); write(); });
  for (const each of [form, pairForm]) if (each) each.addEventListener("submit", (e) => e.preventDefault());
  one("#clear").addEventListener("click", () => {
    history.replaceState(null, "", "#q=");
    read();
    write();
    form.q.focus();
  });
  window.addEventListener("hashchange", read);

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button, a");
    const chooser = one(".chooser");
    if (chooser && !chooser.contains(event.target)) chooser.open = false;
    if (!target) return;
    const head = target.closest("thead th[data-kind]");
    if (head) {
      turn(head.closest("table"), head);
      menuOfSorting();
      write();
    } else if (target.classList.contains("toggle")) {
      const open = target.getAttribute("aria-expanded") !== "true";
      target.setAttribute("aria-expanded", String(open));
      target.closest("tr").nextElementSibling.hidden = !open;
    } else if (target.classList.contains("copy")) {
      copy(target, one("pre", target.closest(".commands")));
    } else if (target.id === "theme") {
      paint(dark() ? "light" : "dark");
    } else if (target.matches('a[href^="#"]')) {
      const place = document.getElementById(target.getAttribute("href").slice(1));
      if (place) { // the address keeps the filters
        event.preventDefault();
        place.focus({ preventScroll: true });
        place.scrollIntoView();
      }
    }
  });
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, select, textarea");
    const chooser = one(".chooser");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      form.q.focus();
      form.q.select();
    } else if (event.key === "Escape" && chooser && chooser.open) {
      chooser.open = false;
      one("summary", chooser).focus();
    } else if (event.key === "Escape" && event.target === form.q && form.q.value) {
      form.q.value = "";
      filter();
      write();
    }
  });

  // Copying, also where the page was opened as a file and the clipboard is closed.
  async function copy(button, source) {
    const text = source.textContent;
    let done = false;
    try {
      await navigator.clipboard.writeText(text);
      done = true;
    } catch {
      const area = document.createElement("textarea");
      area.className = "offscreen";
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
      button.focus();
    }
    if (!done) getSelection().selectAllChildren(source);
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  // Light and dark: what the system says, until someone says otherwise.
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  function paint(theme) {
    if (theme) {
      root.dataset.theme = theme;
      try { localStorage.setItem("lm-calib-theme", theme); } catch { /* not allowed to remember */ }
    }
    one("#theme").textContent = dark() ? "Light" : "Dark";
  }
  try {
    const before = localStorage.getItem("lm-calib-theme");
    if (before === "light" || before === "dark") root.dataset.theme = before;
  } catch { /* not allowed to remember */ }
  system.addEventListener("change", () => paint());
  paint();
  read();
})();
