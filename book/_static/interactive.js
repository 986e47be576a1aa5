// Moves the pictures of npmerge.report.interactive. Without it each stays as it is drawn, and its controls stay hidden.
(() => {
  "use strict";

  const still = window.matchMedia("(prefers-reduced-motion: reduce)");

  function begin(figure) {
    const data = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    const part = (name) => figure.querySelector(`[data-part="${CSS.escape(name)}"]`);
    const controls = figure.querySelector(".npm-controls");
    const slider = controls.querySelector("input[type=range]");
    const choice = controls.querySelector("[data-choice]");
    const toggle = controls.querySelector("[data-toggle]");
    const output = controls.querySelector("output");
    let step = data.start;

    function show() {
      const frames = choice ? data.choices[choice.value] : data.parts;
      for (const [name, attributes] of Object.entries(frames)) {
        for (const [key, values] of Object.entries(attributes)) {
          if (key === "text") part(name).textContent = values[step];
          else part(name).setAttribute(key, values[step]);
        }
      }
      if (slider) {
        slider.value = step;
        slider.setAttribute("aria-valuetext", output.textContent);
      }
    }

    if (slider) play(slider, controls.querySelector("[data-play]"));
    if (choice) choice.addEventListener("change", show);
    if (toggle) {
      const name = toggle.textContent;
      toggle.addEventListener("click", () => {
        step = 1 - step;
        toggle.setAttribute("aria-pressed", String(step === 1));
        toggle.textContent = step === 1 ? "Put back" : name;
        show();
      });
    }
    figure.querySelectorAll("[data-tell]").forEach((node) => tell(figure, node, output));
    controls.hidden = false;
    show();

    function play(slider, button) {
      const last = Number(slider.max);
      let timer = null;

      function stop() {
        clearInterval(timer);
        timer = null;
        button.textContent = "Play";
        output.setAttribute("aria-live", "polite");
      }

      slider.addEventListener("input", () => {
        stop();
        step = Number(slider.value);
        show();
      });
      button.addEventListener("click", () => {
        if (timer !== null) return stop();
        if (step === last) step = 0;
        show();
        button.textContent = "Stop";
        output.setAttribute("aria-live", "off"); // not every step is read aloud
        timer = setInterval(() => {
          step += 1;
          if (step >= last) stop();
          show();
        }, Math.max(60, 5000 / last));
      });
      const asked = () => {
        button.hidden = still.matches;
        if (still.matches) stop();
      };
      still.addEventListener("change", asked);
      asked();
    }
  }

  // A part of a drawing that says more when it is pointed at, focused or tapped.
  function tell(figure, node, output) {
    figure.querySelector("svg").setAttribute("role", "group");
    node.setAttribute("tabindex", "0");
    node.setAttribute("role", "button");
    node.setAttribute("aria-label", node.dataset.tell);
    const say = () => {
      figure.querySelectorAll("[data-tell]").forEach((one) => one.classList.toggle("npm-chosen", one === node));
      output.textContent = node.dataset.tell;
    };
    ["pointerenter", "focus", "click"].forEach((event) => node.addEventListener(event, say));
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      say();
    });
  }

  const all = () => document.querySelectorAll(".npm-interactive").forEach(begin);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
