// Sets the colours before the page is drawn. A plain script in the head: a module would come too late.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("unclip-theme");
  } catch {
    // The browser keeps nothing; the system's colours are used.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
