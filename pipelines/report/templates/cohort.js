"use strict";
// The table of scans: filtered, sorted and paged here, so that thousands of rows stay quick.
(() => {
  const source = document.getElementById("rows");
  if (!source) return;
  const PAGE = 50;
  let size = PAGE;
  // Title, place in a row, whether it is a number.
  const COLUMNS = [
    ["Subject", 1], ["Session", 2], ["Site", 3], ["Sequence", 4], ["Status", 5], ["Code", 6],
    ["SSIM", 7, true], ["Edges kept", 8, true], ["Volume drift", 9, true], ["Outlier", 10, true],
    ["Scan", 11],
  ];
  const STATUS = 5;
  const rows = JSON.parse(source.textContent).map((cells) => {
    const text = cells.slice(1).filter((c) => typeof c === "string").join(" ").toLowerCase();
    return { cells, text, id: /^scan-(\w*)/.exec(cells[0] ?? "")?.[1] ?? "" };
  });
  const get = (id) => document.getElementById(id);
  const search = get("search"), table = get("table");
  const selects = [["status", STATUS], ["site", 3], ["sequence", 4]].map(([id, at]) => [get(id), at]);
  const used = COLUMNS.filter(([, at]) => rows.some((r) => r.cells[at] !== "" && r.cells[at] !== null));
  let sort = null, falling = false, page = 0, code = null, shown = rows;

  for (const [select, at] of selects) {
    for (const value of [...new Set(rows.map((r) => r.cells[at]))].sort()) {
      if (value) select.append(new Option(value, value));
    }
  }
  for (const [title, at, number] of used) {
    const head = document.createElement("th");
    head.scope = "col";
    if (number) head.className = "num";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => {
      falling = sort === at && !falling;
      sort = at;
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      update();
    });
    head.append(button);
    table.tHead.rows[0].append(head);
  }

  const compare = (a, b) => {
    const [x, y] = [a.cells[sort], b.cells[sort]];
    if (x === y) return 0;
    if (x === null || x === "") return 1; // what is missing goes last, whatever the direction
    if (y === null || y === "") return -1;
    const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return falling ? -order : order;
  };

  // A word beyond the digits that are shown: with a page the whole scan_id is known, else its beginning.
  const isOf = ({ id, cells }, word) =>
    word.length > 8 && (id ? id.startsWith(word) : word.startsWith(cells[11]));

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.filter((row) =>
      words.every((word) => row.text.includes(word) || isOf(row, word)) &&
      selects.every(([select, at]) => !select.value || row.cells[at] === select.value) &&
      (code === null || row.cells[6] === code));
    if (sort !== null) shown = [...shown].sort(compare);
    page = 0;
    draw();
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / size));
    const body = document.createDocumentFragment();
    for (const { cells } of shown.slice(page * size, (page + 1) * size)) {
      const line = document.createElement("tr");
      used.forEach(([, at, number], index) => {
        const cell = document.createElement(index ? "td" : "th");
        if (!index) cell.scope = "row";
        const value = cells[at];
        const text = value === null || value === "" ? "–" : number ? value.toFixed(3) : value;
        if (number) cell.className = "num";
        if (!index && cells[0]) {
          const link = document.createElement("a");
          link.href = cells[0];
          link.textContent = text;
          cell.append(link);
        } else if (at === STATUS) {
          const mark = document.createElement("span");
          mark.className = "status " + (value === "not usable" ? "unusable" : value);
          mark.textContent = text;
          cell.append(mark);
        } else if (at === 6 && value) {
          const mark = document.createElement("code");
          mark.textContent = text;
          cell.append(mark);
        } else {
          cell.textContent = text;
        }
        line.append(cell);
      });
      body.append(line);
    }
    table.tBodies[0].replaceChildren(body);
    const only = code === null ? "" : `, only ${code}`;
    get("count").textContent = `${shown.length} of ${rows.length} scans${only}`;
    get("where").textContent = pages > 1 ? `page ${page + 1} of ${pages}` : "";
    get("back").hidden = get("forth").hidden = pages === 1;
    // Not disabled: who turns pages by keyboard would lose the place.
    get("back").setAttribute("aria-disabled", String(page === 0));
    get("forth").setAttribute("aria-disabled", String(page >= pages - 1));
  }

  // On paper all rows that are shown, since nobody can turn its pages.
  for (const [event, most] of [["beforeprint", Infinity], ["afterprint", PAGE]]) {
    addEventListener(event, () => { size = most; page = 0; draw(); });
  }
  search.addEventListener("input", update);
  for (const [select] of selects) select.addEventListener("change", update);
  search.form.addEventListener("submit", (event) => event.preventDefault());
  search.form.addEventListener("reset", () => { code = null; setTimeout(update); });
  for (const [id, step] of [["back", -1], ["forth", 1]]) {
    get(id).addEventListener("click", () => {
      if (get(id).getAttribute("aria-disabled") === "false") { page += step; draw(); }
    });
  }
  for (const button of document.querySelectorAll("button[data-code]")) {
    button.addEventListener("click", () => {
      search.form.reset();
      code = button.dataset.code === "–" ? "" : button.dataset.code;
      const wanted = code;
      setTimeout(() => {
        code = wanted;
        get("status").value = button.dataset.status;
        update();
        get("scans").scrollIntoView();
        get("status").focus({ preventScroll: true });
      });
    });
  }
  // After Back the browser fills the filters in by itself, or shows the page as it was left.
  addEventListener("pageshow", (event) => { if (!event.persisted) update(); });
  update();
})();
