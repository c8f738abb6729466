// What the visible screen hears from the daemon. One stream at a time, none while nobody looks.

import { session } from "./api.js";

const FIRST_PAUSE = 1000;
const LONGEST_PAUSE = 30000;

// Something is said every second whatever the topic: so long without a word is a connection that is dead.
const SILENCE = 8000;

const EVENTS = ["now", "accounts", "horizon", "requests", "own"];

// Whoever holds a client key hears that its session goes on, and nothing of the owner's.
const OWN = "own";

export class Live {
  /** *onState* hears `{name, retryAt, heardAt}` with name connecting, open, lost or paused; *onEnd* that the session is over. */
  constructor(onState, onEnd) {
    this.onState = onState;
    this.onEnd = onEnd;
    this.topic = null;
    this.source = null;
    this.pause = FIRST_PAUSE;
    this.timer = 0;
    this.watchdog = 0;
    this.heardAt = null;
    this.state = "paused";
    document.addEventListener("visibilitychange", () => this.#look());
    addEventListener("online", () => this.retry());
    addEventListener("pagehide", () => this.#close());
    addEventListener("pageshow", (event) => event.persisted && this.#look());
  }

  /** Hear *topic* instead of what was heard before; null: nothing. */
  watch(topic, onEvent) {
    this.#close();
    this.topic = topic;
    this.onEvent = onEvent;
    this.pause = FIRST_PAUSE;
    this.heardAt = null;
    this.#look();
  }

  /** Try again now. */
  retry() {
    if (this.state !== "lost") return;
    this.#open();
  }

  #look() {
    if (document.hidden || this.topic === null) {
      this.#close();
      this.#tell("paused");
    } else if (this.source === null) {
      this.#open();
    }
  }

  #open() {
    this.#close();
    if (this.state !== "lost") this.#tell("connecting");
    const source = new EventSource(this.topic === OWN ? "/ui/api/own/live" : `/ui/api/live?topic=${encodeURIComponent(this.topic)}`);
    this.source = source;
    for (const name of EVENTS) {
      source.addEventListener(name, (event) => {
        this.#heard();
        this.onEvent(name, JSON.parse(event.data));
      });
    }
    source.addEventListener("open", () => this.#heard());
    // The daemon ends, or the session: which of the two is asked below.
    source.addEventListener("end", () => this.#lost());
    source.addEventListener("error", () => this.#lost());
    this.#guard();
  }

  #heard() {
    this.heardAt = Date.now() / 1000;
    this.pause = FIRST_PAUSE;
    this.#guard();
    if (this.state !== "open") this.#tell("open");
  }

  #guard() {
    clearTimeout(this.watchdog);
    this.watchdog = setTimeout(() => this.#lost(), SILENCE);
  }

  #close() {
    clearTimeout(this.timer);
    clearTimeout(this.watchdog);
    this.source?.close();
    this.source = null;
  }

  async #lost() {
    const source = this.source;
    if (source === null) return;
    this.#close();
    const pause = this.pause * (0.8 + 0.4 * Math.random());
    this.pause = Math.min(LONGEST_PAUSE, this.pause * 2);
    this.#tell("lost", Date.now() / 1000 + pause / 1000);
    this.timer = setTimeout(() => this.#open(), pause);
    try {
      const found = await session();
      if (!found.authenticated) {
        this.#close();
        this.topic = null;
        this.onEnd();
      }
    } catch {
      // Nobody there: the next try will tell.
    }
  }

  #tell(name, retryAt = null) {
    this.state = name;
    this.onState({ name, retryAt, heardAt: this.heardAt });
  }
}
