// Two canvases of one scan, before and after: they share crosshair, view and intensity scale.
const get = (id) => document.getElementById(id);
const root = get("viewer");
const has = new Set(root.dataset.volumes.split(" "));
const url = (kind) => `${root.dataset.base}/${kind}.nii.gz`;
const OVERLAYS = {
  change: { colormap: "warm", colormapNegative: "winter", cal_min: 0.02, cal_max: 0.3 },
  uncertainty: { colormap: "inferno", cal_min: 0.005, cal_max: 0.1 },
};

function trouble(text) {
  get("trouble").textContent = `${text} The page of this scan shows slices.`;
  get("trouble").hidden = false;
  root.hidden = true;
}

const volume = (kind, more = {}) => ({
  url: url(kind), name: `${kind}.nii.gz`, colormap: "gray", cal_min: 0, cal_max: 1.25, opacity: 1, ...more,
});

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    trouble("This browser has no WebGL 2, which the 3D viewer needs.");
    return;
  }
  const { Niivue } = await import("./niivue.js");
  const sides = ["left", "right"].filter((side) => get(side));
  const views = [];
  let shown = null; // the overlay that is drawn

  for (const side of sides) {
    const nv = new Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.35, 0.65, 1, 0.8], crosshairWidth: 0.5,
      show3Dcrosshair: true,
      isRadiologicalConvention: false, isOrientationTextVisible: true,
      showAllOrientationMarkers: true, isOrientCube: true, fontColor: [1, 1, 1, 1],
      dragAndDropEnabled: false, loadingText: "loading", multiplanarForceRender: false,
      viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "", // the buttons are for both sides
    });
    await nv.attachToCanvas(get(side));
    views.push(nv);
  }
  const kinds = () => ["before", get("which")?.value ?? "after"];
  const load = async (index) => {
    const list = [volume(kinds()[index])];
    if (shown) list.push(volume(shown, { ...OVERLAYS[shown], opacity: get("opacity").value / 100 }));
    // Between voxels a small decrease would be mixed with the colour of what did not change: warm.
    views[index].setInterpolation(shown === "change");
    await views[index].loadVolumes(list);
    const which = get("which");
    if (index && which) get("right").setAttribute("aria-label", which.selectedOptions[0].text);
    views[index].createOnLocationChange(); // the value beside the picture is of what is shown now
  };
  // One after the other: what was chosen last is shown last. Until then the pictures are dim.
  let loads = Promise.resolve();
  const again = (...sides) => {
    root.setAttribute("aria-busy", "true");
    const mine = loads.then(() => Promise.all(sides.map(load))).catch(
      () => trouble("A volume could not be loaded, so nothing is shown. Load this page again."));
    loads = mine;
    return mine.then(() => { if (loads === mine) root.removeAttribute("aria-busy"); });
  };

  // One crosshair: whichever side moves, the other follows.
  let following = false;
  function follow(index, location) {
    const mm = [...location.mm].slice(0, 3).map((value) => value.toFixed(1)).join(", ");
    const value = location.values[0] ? Number(location.values[0].value).toFixed(3) : "–";
    get(`at-${sides[index]}`).textContent = `${mm} mm: ${value}`;
    if (following) return;
    following = true;
    const from = views[index];
    views.forEach((nv, other) => {
      if (other === index || !nv.volumes.length) return;
      nv.scene.crosshairPos = [...from.scene.crosshairPos];
      nv.drawScene();
      nv.createOnLocationChange();
    });
    document.querySelectorAll("[data-axis]").forEach((slider) => {
      slider.value = Math.round(from.scene.crosshairPos[Number(slider.dataset.axis)] * 1000);
    });
    following = false;
  }
  views.forEach((nv, index) => {
    nv.onLocationChange = (location) => follow(index, location);
    nv.broadcastTo(views.filter((other) => other !== nv), { "2d": true, "3d": true });
  });
  await Promise.all(views.map((_, index) => load(index)));

  for (const slider of document.querySelectorAll("[data-axis]")) {
    slider.addEventListener("input", () => {
      const position = [...views[0].scene.crosshairPos];
      position[Number(slider.dataset.axis)] = slider.value / 1000;
      views[0].scene.crosshairPos = position;
      views[0].drawScene();
      views[0].createOnLocationChange();
    });
  }
  const types = { axial: 0, coronal: 1, sagittal: 2, multi: 3, render: 4 };
  const buttons = document.querySelectorAll("[data-view]");
  for (const button of buttons) {
    button.addEventListener("click", () => {
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
      for (const nv of views) nv.setSliceType(types[button.dataset.view]);
    });
  }
  const overlays = document.querySelectorAll("[data-overlay]");
  for (const button of overlays) {
    button.addEventListener("click", async () => {
      shown = shown === button.dataset.overlay ? null : button.dataset.overlay;
      for (const other of overlays) {
        other.setAttribute("aria-pressed", String(other.dataset.overlay === shown));
      }
      await again(...views.keys());
      root.dataset.overlay = shown ?? "";
    });
  }
  get("opacity")?.addEventListener("input", (event) => {
    for (const nv of views) if (nv.volumes.length > 1) nv.setOpacity(1, event.target.value / 100);
  });
  get("which")?.addEventListener("change", () => again(1));
  root.dataset.ready = "yes";
}

if (has.has("before")) start().catch((error) => trouble(`The 3D viewer could not start (${error.message}).`));
