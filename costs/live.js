"use strict";
// Reads the page again every few seconds and changes what is different, so that scroll positions, open notes and chosen
// runs stay.
const every = 1000 * Number(document.documentElement.dataset.every);
let tag = document.documentElement.dataset.tag;

function morph(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeName !== fresh.nodeName || old.childNodes.length !== fresh.childNodes.length) {
    old.replaceWith(document.importNode(fresh, true));
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const name of new Set([...old.getAttributeNames(), ...fresh.getAttributeNames()])) {
    if (name === "open") continue;
    if (!fresh.hasAttribute(name)) old.removeAttribute(name);
    else if (old.getAttribute(name) !== fresh.getAttribute(name)) old.setAttribute(name, fresh.getAttribute(name));
  }
  const later = [...fresh.childNodes];
  [...old.childNodes].forEach((child, index) => morph(child, later[index]));
}

function say(text) {
  document.getElementById("seen").textContent = text;
}

async function look() {
  try {
    const answer = await fetch(location.href, {headers: {"If-None-Match": tag}, cache: "no-store"});
    if (answer.status === 200) {
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      tag = fresh.documentElement.dataset.tag;
      document.title = fresh.title;
      morph(document.querySelector("main"), fresh.querySelector("main"));
    }
    const known = answer.status === 200 || answer.status === 304;
    say(known ? `read at ${new Date().toLocaleTimeString()}` : `the server answers ${answer.status}`);
  } catch {
    say("the server does not answer; start it again, this page goes on by itself");
  }
  setTimeout(look, every);
}

setTimeout(look, every);
