"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  for (const element of document.querySelectorAll(".filter, .choose, .theme")) element.hidden = false;

  // Colours: the switch wins over what the system prefers, and is remembered where the browser allows it.
  const buttons = [...document.querySelectorAll("[data-set-theme]")];
  const setTheme = (name) => {
    if (name === "auto") delete root.dataset.theme;
    else root.dataset.theme = name;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.setTheme === name));
  };
  const remember = (name) => {
    try { localStorage.setItem("echoshift-theme", name); } catch { /* a page from disk may not be allowed to */ }
  };
  let known = null;
  try { known = localStorage.getItem("echoshift-theme"); } catch { /* the same */ }
  setTheme(known === "light" || known === "dark" ? known : "auto");
  for (const button of buttons) {
    button.addEventListener("click", () => { setTheme(button.dataset.setTheme); remember(button.dataset.setTheme); });
  }

  // Tables sort by a column's numbers where it has any, else by its words; what has none comes last.
  const read = (row, i) => {
    const cell = row.cells[i];
    const words = cell.textContent.trim();
    return { words, value: "value" in cell.dataset ? Number(cell.dataset.value) : null };
  };
  const collator = new Intl.Collator("en", { numeric: true });
  const sortTable = (table, i, ascending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: read(row, i) }));
    const numeric = rows.some(({ key }) => key.value !== null);
    rows.sort(({ key: a }, { key: b }) => {
      if (numeric) {
        if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
        return ascending ? a.value - b.value : b.value - a.value;
      }
      const isDash = (key) => key.words === "–" || key.words === "-";
      if (isDash(a) || isDash(b)) return isDash(a) - isDash(b);
      return ascending ? collator.compare(a.words, b.words) : collator.compare(b.words, a.words);
    });
    body.append(...rows.map(({ row }) => row));
    [...table.tHead.rows[0].cells].forEach((cell, j) => {
      if (j === i) cell.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
    });
  };
  for (const table of document.querySelectorAll("[data-table] table")) {
    [...table.tHead.rows[0].cells].forEach((cell, i) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => {
        const first = cell.classList.contains("number") ? "descending" : "ascending";
        const now = cell.getAttribute("aria-sort");
        sortTable(table, i, now === null ? first === "ascending" : now === "descending");
      });
    });
  }

  // A filter keeps what holds all of its words.
  const addFilter = (block, items) => {
    const input = block.querySelector(".filter input");
    if (!input) return;
    const count = block.querySelector(".filter-count");
    const texts = items.map((item) => (item.dataset.words ?? item.textContent).toLowerCase());
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let n = 0;
      items.forEach((item, i) => {
        item.hidden = !words.every((word) => texts[i].includes(word));
        n += item.hidden ? 0 : 1;
      });
      count.textContent = words.length ? `${n} of ${items.length}` : "";
    });
  };
  for (const block of document.querySelectorAll("[data-table]")) addFilter(block, [...block.querySelectorAll("tbody tr")]);
  for (const block of document.querySelectorAll("[data-segments]")) addFilter(block, [...block.querySelectorAll(".segment")]);

  for (const choice of document.querySelectorAll(".choice")) {
    const select = choice.querySelector("select");
    const show = () => {
      for (const panel of choice.querySelectorAll(".panel")) panel.hidden = panel.dataset.panel !== select.value;
    };
    select.addEventListener("change", show);
    show();
  }

  // The table of contents marks the section that is being read.
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const sections = [...document.querySelectorAll("main > section")];
  const mark = () => {
    const line = innerHeight / 3;
    const read = sections.filter((section) => section.getBoundingClientRect().top <= line).at(-1);
    for (const [id, link] of links) {
      if (read && id === read.id) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; mark(); });
  }, { passive: true });
  mark();
})();
