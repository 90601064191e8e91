"use strict";
(() => {
  const records = [...document.querySelectorAll("#table-records tbody tr")].map((row) => ({
    id: row.cells[0].textContent,
    href: row.cells[0].querySelector("a").getAttribute("href"),
    subject: row.cells[1].textContent,
    scale: row.cells[2].textContent,
    seed: row.cells[3].textContent,
    date: row.cells[4].textContent,
    commit: row.dataset.commit,
    device: row.cells[6].textContent,
    command: row.cells[8].textContent,
  }));
  // "0-4 9" names the records 0, 1, 2, 3, 4 and 9 of the table at the page's end.
  const decode = (text) =>
    (text || "").split(" ").filter(Boolean).flatMap((part) => {
      const [first, last = first] = part.split("-").map(Number);
      return Array.from({ length: last - first + 1 }, (_, index) => records[first + index]);
    });
  const element = (name, text, properties = {}) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    return Object.assign(made, properties);
  };

  // --- where numbers come from ---------------------------------------------------------------------------------------
  const panel = document.getElementById("panel");
  const place = document.getElementById("panel-place");
  const value = document.getElementById("panel-value");
  const body = document.getElementById("panel-body");

  const copyButton = (text) => {
    const button = element("button", "Copy", { type: "button", className: "copy" });
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Select it and copy by hand";
      }
    });
    return button;
  };

  const block = (group) => {
    const first = group[0];
    const box = element("section", undefined, { className: "origin" });
    const commands = [...new Set(group.map((record) => record.command))].sort().map((text) => {
      const line = element("p", undefined, { className: "command" });
      line.append(element("code", text), copyButton(text));
      return line;
    });
    const facts = element("dl");
    const days = group.map((record) => record.date).sort();
    const from = days[0];
    const to = days[days.length - 1];
    for (const [name, text] of [
      ["Code", first.commit],
      ["Device", first.device],
      ["Scale", first.scale],
      ["Date (UTC)", from === to ? from : `${from} to ${to}`],
    ]) {
      facts.append(element("dt", name), element("dd", text));
    }
    const list = element("ul");
    for (const record of group) {
      const item = element("li");
      item.append(element("a", record.id, { href: record.href }));
      const facts = [record.subject, record.seed === "–" ? "" : `seed ${record.seed}`].filter(Boolean);
      if (facts.length) item.append(` ${facts.join(", ")}`);
      list.append(item);
    }
    const details = element("details", undefined, { open: group.length <= 24 });
    details.append(element("summary", group.length === 1 ? "1 record" : `${group.length} records`), list);
    box.append(facts, ...commands, details);
    return box;
  };

  const show = (title, text, indices) => {
    const found = decode(indices);
    const groups = new Map();
    for (const record of found) {
      const key = [record.commit, record.device, record.scale].join("\n");
      groups.set(key, [...(groups.get(key) || []), record]);
    }
    place.textContent = title;
    value.textContent = text;
    value.hidden = !text;
    const blocks = [...groups.values()].map(block);
    body.replaceChildren(...(blocks.length ? blocks : [element("p", "Nothing was run for this row yet.")]));
    panel.showModal();
    panel.scrollTop = 0;
  };

  document.getElementById("panel-close").addEventListener("click", () => panel.close());
  panel.addEventListener("click", (event) => {
    if (event.target === panel) panel.close();
  });

  const words = (node) => node.textContent.replace(/\s+/g, " ").trim();
  const titleOf = (node) => {
    const article = node.closest("article, figure.plot");
    if (!article) return "Verdicts";
    return words(article.querySelector("h3, figcaption strong")).replace(/\.$/, "");
  };
  document.addEventListener("click", (event) => {
    if (!(event.target instanceof Element)) return;
    const whole = event.target.closest("button.records");
    if (whole) {
      const owner = whole.closest("[data-records]");
      show(titleOf(owner), "", owner.dataset.records);
      return;
    }
    const row = event.target.closest("tbody tr[data-records]");
    if (!row || (event.target.closest("a, button, summary, details") && !event.target.closest("button.source"))) return;
    if (String(getSelection()).length) return;
    const cell = event.target.closest("td, th");
    const heading = words(row.closest("table").tHead.rows[0].cells[cell.cellIndex]);
    const label = words(row.cells[0]);
    const text = cell.cellIndex ? `${label} — ${heading}: ${words(cell)}` : label;
    show(titleOf(row), text, row.dataset.records);
  });

  // --- sorting -------------------------------------------------------------------------------------------------------
  const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  const compare = (column, sign) => (first, second) => {
    const [a, b] = [first.cells[column], second.cells[column]];
    const numeric = "sort" in a.dataset || "sort" in b.dataset;
    if (!numeric) return sign * collator.compare(words(a), words(b));
    // What has no number stays at the end in both directions.
    if (!("sort" in a.dataset)) return "sort" in b.dataset ? 1 : 0;
    if (!("sort" in b.dataset)) return -1;
    return sign * (Number(a.dataset.sort) - Number(b.dataset.sort));
  };
  const tables = [...document.querySelectorAll("table.data")];
  for (const table of tables) {
    const rows = [...table.tBodies[0].rows];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = heading.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const next = { ascending: "descending", descending: null }[heading.getAttribute("aria-sort")];
        const order = next === undefined ? "ascending" : next;
        for (const other of headings) other.removeAttribute("aria-sort");
        if (order) heading.setAttribute("aria-sort", order);
        const sorted = order ? [...rows].sort(compare(column, order === "ascending" ? 1 : -1)) : rows;
        table.tBodies[0].append(...sorted);
      });
    });
  }

  // --- filtering -----------------------------------------------------------------------------------------------------
  const everywhere = document.getElementById("filter-all");
  const chips = [...document.querySelectorAll(".chips button")];
  const boxes = new Map([...document.querySelectorAll("input[data-filter]")].map((box) => [box.dataset.filter, box]));
  const counts = new Map([...document.querySelectorAll("[data-count]")].map((one) => [one.dataset.count, one]));
  const wordsOf = (text) => text.toLocaleLowerCase("en").split(/\s+/).filter(Boolean);
  const contents = new Map();
  const contentOf = (row) => {
    if (!contents.has(row)) contents.set(row, words(row).toLocaleLowerCase("en"));
    return contents.get(row);
  };
  const filter = (table) => {
    const box = boxes.get(table.id);
    const wanted = [...wordsOf(everywhere.value), ...(box ? wordsOf(box.value) : [])];
    const chip = table.id === "table-claims" ? chips.find((one) => one.getAttribute("aria-pressed") === "true") : null;
    const verdict = chip ? chip.dataset.verdict : "";
    let shown = 0;
    for (const row of table.tBodies[0].rows) {
      const fits = (!verdict || row.dataset.verdict === verdict) && wanted.every((word) => contentOf(row).includes(word));
      row.hidden = !fits;
      if (fits) shown += 1;
    }
    const total = table.tBodies[0].rows.length;
    const noun = total === 1 ? "row" : "rows";
    counts.get(table.id).textContent = shown === total ? `${total} ${noun}` : `${shown} of ${total} ${noun}`;
    const article = table.closest("article");
    if (article) article.classList.toggle("none", shown === 0 && everywhere.value.trim() !== "");
  };
  let pending = 0;
  everywhere.addEventListener("input", () => {
    clearTimeout(pending);
    pending = setTimeout(() => tables.forEach(filter), 80);
  });
  for (const [id, box] of boxes) box.addEventListener("input", () => filter(document.getElementById(id)));
  for (const chip of chips) {
    chip.addEventListener("click", () => {
      for (const other of chips) other.setAttribute("aria-pressed", String(other === chip));
      filter(document.getElementById("table-claims"));
    });
  }

  // --- light and dark, print -----------------------------------------------------------------------------------------
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("main details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
  document.documentElement.classList.add("scripted");
})();
