// A page that was opened as a file may start no worker, and the search is one: it runs in a frame of the page instead.
// The search asks for a class of this name.
class IFrameWorker extends EventTarget {
  constructor(url) {
    super();
    this.unsent = [];
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    this.frame.addEventListener("load", () => this.start(new URL(url, document.baseURI).href), { once: true });
    document.body.append(this.frame);
  }

  async start(url) {
    const inside = this.frame.contentWindow;
    inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
    inside.importScripts = (...urls) => urls.reduce((before, one) => before.then(() => load(inside, one)), Promise.resolve());
    await load(inside, url);
    this.postMessage = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    this.unsent.forEach((data) => this.postMessage(data));
  }

  postMessage(data) {
    this.unsent.push(data);
  }

  terminate() {
    this.frame.remove();
  }
}

function load(inside, url) {
  return new Promise((resolve, reject) => {
    const script = inside.document.createElement("script");
    Object.assign(script, { src: url, onload: resolve, onerror: reject });
    inside.document.body.append(script);
  });
}

if (location.protocol === "file:") Object.assign(window, { IFrameWorker, Worker: IFrameWorker });
