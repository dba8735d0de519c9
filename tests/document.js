// As much of a browser's document as the script of a page uses; whatever else it asked for would be an error.
"use strict";
class Element {
  constructor(tag, attributes) {
    this.tag = tag;
    this.attributes = attributes || {};
    this.childNodes = [];
    this.listeners = {};
    this.properties = {};
    this.style = { setProperty: (name, value) => { this.properties[name] = String(value); } };
    this.hidden = "hidden" in this.attributes;
    this.value = this.attributes.value || "";
    const names = () => this.className.split(" ").filter(Boolean);
    this.classList = {
      contains: (name) => names().includes(name),
      add: (name) => { this.className = [...names(), name].join(" "); },
      toggle: (name) => {
        const there = names().includes(name);
        this.className = (there ? names().filter((one) => one !== name) : [...names(), name]).join(" ");
        return !there;
      },
    };
  }
  get className() { return this.attributes.class || ""; }
  set className(value) { this.attributes.class = value; }
  get children() { return this.childNodes.filter((node) => node instanceof Element); }
  get dataset() {
    const found = {};
    for (const name of Object.keys(this.attributes)) if (name.startsWith("data-")) found[name.slice(5)] = this.attributes[name];
    return found;
  }
  get textContent() { return this.childNodes.map((node) => (node instanceof Element ? node.textContent : node)).join(""); }
  set textContent(text) { this.childNodes = [String(text)]; }
  append(...nodes) { this.childNodes.push(...nodes.map((node) => (node instanceof Element ? node : String(node)))); }
  replaceChildren(...nodes) { this.childNodes = []; this.append(...nodes); }
  setAttribute(name, value) { this.attributes[name] = value; }
  addEventListener(name, listener) { this.listeners[name] = listener; }
  scrollIntoView() {}
  *all() {
    for (const child of this.children) {
      yield child;
      yield* child.all();
    }
  }
  plain() {
    const { tag, attributes, hidden, disabled, title, alt, src, loading, colSpan, properties } = this;
    const children = this.childNodes.map((node) => (node instanceof Element ? node.plain() : node));
    return { tag, attributes, hidden, disabled, title, alt, src, loading, colSpan, properties, children };
  }
}
function built([tag, attributes, children]) {
  const element = new Element(tag, attributes);
  element.append(...children.map((child) => (Array.isArray(child) ? built(child) : child)));
  if (tag === "select") element.value = element.children[0].attributes.value;
  return element;
}
function matching(test) { return [...root.all()].filter(test); }
let root;
const document = {
  createElement: (tag) => new Element(tag),
  getElementById: (id) => matching((element) => element.attributes.id === id)[0] || null,
  querySelectorAll: (selector) =>
    selector.startsWith(".")
      ? matching((element) => element.classList.contains(selector.slice(1)))
      : matching((element) => selector.slice(1, -1) in element.attributes),
};
function open(tree) { root = built(tree); }
function type(text) { const find = document.getElementById("find"); find.value = text; find.listeners.input(); }
function choose(order) { const all = document.getElementById("order"); all.value = order; all.listeners.change(); }
function press(className, at) { document.querySelectorAll("." + className)[at].listeners.click(); }
function turn(pager, at) { document.querySelectorAll(".pager")[pager].children[at].onclick(); }
function plain() { return JSON.stringify(root.plain()); }
