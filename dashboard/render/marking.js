// A text whose words can be marked: click a word, drag over several, or use the keyboard.
export default function (component) {
  const { data, setStateValue, parentElement } = component;
  let root = parentElement.querySelector(".sk-marking");
  if (root && root.dataset.id === data.id) return;
  if (!root) {
    root = document.createElement("div");
    root.className = "sk-marking";
    parentElement.appendChild(root);
  }
  root.dataset.id = data.id;
  root.dir = "auto";
  const marked = new Set(data.marked);
  const words = [];
  root.replaceChildren(
    ...data.pieces.map(([text, hint, isWord]) => {
      // textContent, never innerHTML: the text is a model's.
      const piece = document.createElement("span");
      piece.textContent = text;
      if (!isWord) return piece;
      piece.className = hint ? "word hinted" : "word";
      piece.title = hint;
      piece.tabIndex = 0;
      piece.setAttribute("role", "checkbox");
      piece.dataset.place = words.length;
      words.push(piece);
      return piece;
    }),
  );
  const show = (from, to, on) => {
    words.forEach((word, place) => {
      const within = from !== null && place >= Math.min(from, to) && place <= Math.max(from, to);
      const is = within ? on : marked.has(place);
      word.classList.toggle("marked", is);
      word.setAttribute("aria-checked", String(is));
    });
    // Spaces between two marked words belong to the mark.
    root.querySelectorAll("span:not(.word)").forEach((gap) => {
      const [before, after] = [gap.previousElementSibling, gap.nextElementSibling];
      gap.classList.toggle("marked", !!(before?.matches(".marked") && after?.matches(".marked")));
    });
  };
  const apply = (from, to, on) => {
    for (let place = Math.min(from, to); place <= Math.max(from, to); place++) on ? marked.add(place) : marked.delete(place);
    show(null, null, false);
    setStateValue("marked", [...marked].sort((one, other) => one - other));
  };
  const placeOf = (event) => {
    const word = event.target.closest?.(".word");
    return word && root.contains(word) ? Number(word.dataset.place) : null;
  };
  let start = null, last = null, on = true;
  root.onpointerdown = (event) => {
    start = last = placeOf(event);
    if (start === null) return;
    // Else a finger or pen sends every later event to the word it first touched.
    event.target.releasePointerCapture?.(event.pointerId);
    on = !marked.has(start);
    show(start, last, on);
    event.preventDefault();
  };
  root.onpointerover = (event) => {
    const place = placeOf(event);
    if (start === null || place === null) return;
    last = place;
    show(start, last, on);
  };
  const finish = () => {
    if (start === null) return;
    const [from, to] = [start, last];
    start = null;
    apply(from, to, on);
    words[to].focus();
  };
  const abandon = () => {
    start = null;
    show(null, null, false);
  };
  document.addEventListener("pointerup", finish);
  document.addEventListener("pointercancel", abandon);
  root.onkeydown = (event) => {
    const place = placeOf(event);
    if (place === null) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) words[place + step]?.focus();
    else if (event.key === " " || event.key === "Enter") apply(place, place, !marked.has(place));
    else return;
    event.preventDefault();
  };
  show(null, null, false);
  return () => {
    document.removeEventListener("pointerup", finish);
    document.removeEventListener("pointercancel", abandon);
  };
}
