// Shows the tiles that the server beside this page has, and those that come while the picture is still being read.
"use strict";

const said = document.getElementById("said");
let state = ", being read …";

async function facts() {
  return (await fetch("facts.json")).json();
}

function show(picture) {
  document.title = `${picture.name} – tiler view`;
  window.viewer = OpenSeadragon({
    id: "picture",
    tileSources: {
      width: picture.width,
      height: picture.height,
      tileSize: picture.side,
      tileOverlap: picture.overlap,
      minLevel: Math.min(8, picture.levels),
      maxLevel: picture.levels,
      getTileUrl: (level, x, y) => `tiles/${level}/${x}_${y}.jpg`,
    },
    showNavigationControl: false,
    showNavigator: true,
    maxZoomPixelRatio: 16,
    visibilityRatio: 0.5,
    tileRetryMax: 1e6, // until the server has them
    tileRetryDelay: 250,
  });
  const zoom = () => {
    const item = viewer.world.getItemAt(0);
    if (!item) return;
    const share = item.viewportToImageZoom(viewer.viewport.getZoom(true));
    viewer.drawer.setImageSmoothingEnabled(share < 2); // pixels are seen as such
    said.textContent = `${picture.name}, ${picture.width}×${picture.height}, ${Math.round(100 * share)} %${state}`;
  };
  viewer.addHandler("animation", zoom);
  viewer.addHandler("open", zoom);
  watch(zoom);
}

async function watch(zoom) {
  for (;;) {
    let picture;
    try {
      picture = await facts();
    } catch {
      state = "; tiler view has ended";
    }
    if (picture) state = picture.fault ? `; ${picture.fault}` : picture.whole ? "" : state;
    zoom();
    if (!picture || picture.fault || picture.whole) return;
    await new Promise((done) => setTimeout(done, 500));
  }
}

facts().then(show);
