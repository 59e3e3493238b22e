// The panels of the viewer: variations, interpolation and text diffs, each with what the server takes.
import { button, el, notify } from "./dom.js";
import { readPicture, takesDrops } from "./intake.js";
import { randomSeed } from "./settings.js";

const RECENT = 10; // two rows

/** A slider with its name, its value and a line of explanation. */
function range(name, { min, max, step, value, about }) {
  const shown = el("output", { text: value });
  const input = el("input", { type: "range", min, max, step, value, oninput: () => { shown.textContent = input.value; } });
  const node = el("label", { class: "field" }, el("span", {}, `${name} `, shown), input, about && el("small", { text: about }));
  return { node, get value() { return Number(input.value); } };
}

function words(name, value, about) {
  const input = el("input", { value, maxlength: 1000 });
  const node = el("label", { class: "field" }, el("span", { text: name }), input, about && el("small", { text: about }));
  return { node, input, get value() { return input.value.trim(); } };
}

// As many steps as the server takes by itself, there and back.
const stepsField = () => range("Steps", { min: 10, max: 200, step: 10, value: 50, about: "More steps come closer to the picture and take longer." });

const linspace = (count, end) => Array.from({ length: count }, (_, i) => (end * i) / (count - 1));

/** `draw(options)` starts a run and returns its Job, of whose errors the viewer tells. `recent()` gives [{run, index}] of the history. */
export function createVerbs({ settings, draw, store, addresses, recent }) {
  const model = () => (settings.model ? { model: settings.model.id } : {});
  const submit = (name, run) => button(name, run, { class: "primary" });

  function variation(source, follow) {
    const count = range("Pictures", { min: 1, max: 10, step: 1, value: 4 });
    const eta = range("Change (eta)", { min: 0, max: 1, step: 0.05, value: 1, about: "0 gives the picture itself. 1 keeps what it shows and changes the details." });
    const steps = stepsField();
    const go = () => {
      const fields = { ...model(), n: count.value, seed: randomSeed(), eta: eta.value, steps: steps.value };
      const { kind, picture, created, generator, ...from } = source.settings;
      const kept = { ...(from.prompt ? { prompt: from.prompt } : {}), ...fields };
      follow(draw({ kind: "variation", title: source.title, path: "v1/images/variations", fields, files: { image: source.blob }, count: count.value, partials: settings.partials, quiet: true, settings: kept }));
    };
    return [el("p", { class: "note", text: "Pictures that show the same and differ in the details." }), count.node, eta.node, steps.node, submit("Draw variations", go)];
  }

  function interpolate(source, follow) {
    let second = null;
    const count = range("Pictures", { min: 3, max: 10, step: 1, value: 7 });
    const steps = stepsField();
    const noise = el("select", {}, el("option", { value: "slerp", text: "Turns as well" }), el("option", { value: "fixed", text: "Stays the same" }));
    const file = el("input", { type: "file", accept: "image/*", hidden: true, onchange: () => fromFile(file.files[0]) });
    const slot = takesDrops(el("button", { type: "button", class: "slot", onclick: () => file.click() }, "Choose below, drop a picture, or press to open one"), fromFile);
    const chooser = el("div", { class: "chooser", role: "group", "aria-label": "Recent pictures" });
    for (const { run, index } of recent().filter(({ run, index }) => run.pictures[index]).slice(0, RECENT)) {
      const small = el("img", { alt: `${run.title}, picture ${index + 1}` });
      const id = run.pictures[index];
      addresses.of(id).then((url) => { small.src = url; });
      chooser.append(el("button", { type: "button", class: "tile", onclick: async () => choose({ blob: await store.picture(id), url: small.src, title: run.title }) }, small));
    }
    function choose(picture) {
      second = picture;
      slot.classList.add("full");
      slot.replaceChildren(el("img", { src: picture.url, alt: `Second picture: ${picture.title}` }));
      send.disabled = false;
    }
    async function fromFile(chosen) {
      if (!chosen) return;
      try {
        const { blob } = await readPicture(chosen);
        choose({ blob, url: URL.createObjectURL(blob), title: chosen.name });
      } catch (error) {
        notify(error.message, { kind: "error" });
      }
    }
    const send = submit("Draw the path", () => {
      const fields = { ...model(), n: count.value, noise: noise.value, seed: randomSeed(), steps: steps.value };
      const title = source.title === second.title ? source.title : `${source.title} → ${second.title}`;
      follow(draw({
        kind: "interpolate", title, path: "v1/unclip/interpolate", fields, files: { "image[]": [source.blob, second.blob] },
        count: count.value, partials: settings.partials, quiet: true, settings: fields, thetas: linspace(count.value, 1),
      }));
    });
    send.disabled = true;
    return [
      el("p", { class: "note", text: "Pictures on the way from this one to a second one." }),
      el("div", { class: "two" }, el("div", { class: "slot full" }, el("img", { src: source.url, alt: `First picture: ${source.title}` })), slot),
      file, chooser.childElementCount ? chooser : "", count.node,
      el("label", { class: "field" }, el("span", { text: "Noise" }), noise, el("small", { text: "If the noise turns as well, the ends are the two pictures." })),
      steps.node,
      send,
    ];
  }

  function textDiff(source, follow) {
    const from = words("The picture as it is", source.settings.target ?? source.settings.prompt ?? "", "A description of what it shows.");
    const to = words("As it should become", "");
    const theta = range("How far (theta)", { min: 0.05, max: 1, step: 0.05, value: 0.5 });
    const count = range("Pictures", { min: 3, max: 10, step: 1, value: 6 });
    const steps = stepsField();
    const go = () => {
      if (!to.value || to.value === from.value) {
        to.input.focus();
        return notify(to.value ? "The two descriptions are the same. Change the second one." : "Describe what the picture should become.", { kind: "error" });
      }
      const fields = { ...model(), source: from.value, target: to.value, n: count.value, max_theta: theta.value, seed: randomSeed(), steps: steps.value };
      follow(draw({
        kind: "text_diff", title: `${from.value || "…"} → ${to.value}`, path: "v1/unclip/text_diff", fields, files: { image: source.blob },
        count: count.value, partials: settings.partials, quiet: true, settings: fields, thetas: linspace(count.value, theta.value),
      }));
    };
    return [
      el("p", { class: "note", text: "Changes the picture in the direction from one description to the other." }),
      from.node, to.node, theta.node, count.node, steps.node, submit("Draw the change", go),
    ];
  }

  return {
    panels: [
      { name: "variation", title: "Variations", verb: "variations", build: variation },
      { name: "interpolate", title: "Interpolate", verb: "interpolate", build: interpolate },
      { name: "text_diff", title: "Text diff", verb: "text_diff", build: textDiff },
    ],
  };
}
