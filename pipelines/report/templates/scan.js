"use strict";
// The slider, the flicker and the way from scan to scan.
(() => {
  const compare = document.getElementById("compare");
  if (compare) {
    const slider = document.getElementById("slider"), flicker = document.getElementById("flicker");
    const move = () => {
      compare.style.setProperty("--at", slider.value + "%");
      compare.dataset.only = { 0: "after", 100: "before" }[slider.value] ?? "";
    };
    slider.addEventListener("input", () => { press(false); move(); });
    const press = (on) => {
      flicker.setAttribute("aria-pressed", String(on));
      compare.classList.toggle("flicker", on);
    };
    flicker.addEventListener("click", () => press(flicker.getAttribute("aria-pressed") !== "true"));
    move();
  }
  // Shift with an arrow: not a single character, so it does not stand in the way of other tools.
  document.addEventListener("keydown", (event) => {
    if (!event.shiftKey || event.ctrlKey || event.altKey || event.metaKey) return;
    const rel = { ArrowLeft: "prev", ArrowRight: "next" }[event.key];
    const link = rel && document.querySelector(`a[rel=${rel}]`);
    if (!getSelection().isCollapsed) return; // it lengthens a selection
    if (link && !/^(input|select|textarea)$/i.test(event.target.tagName)) location.href = link.href;
  });
})();
