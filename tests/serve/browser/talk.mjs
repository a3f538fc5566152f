// node talk.mjs REQUEST: open the page in Chromium, load a model, say things to it, and print what came of it, as JSON.
// REQUEST: browser (its program), url, model (its name on the page), said ([mode, text, most tokens], ...), and, if
// wanted: threads, viewport ([width, height]), dark, stopAfter (milliseconds), screenshot (path without ending),
// visits (how often to load), older (without the newest WebAssembly), endServer (its process, before loading).
import { chromium } from "playwright-core";

const request = JSON.parse(process.argv[2]);
const found = { runs: [], errors: [], elsewhere: [], fetched: [], answers: [] };
const browser = await chromium.launch({ executablePath: request.browser, args: ["--no-sandbox"] });
try {
  const [width, height] = request.viewport ?? [1280, 800];
  const page = await browser.newPage({
    viewport: { width, height },
    colorScheme: request.dark ? "dark" : "light",
    isMobile: width < 600,
    hasTouch: width < 600,
    deviceScaleFactor: width < 600 ? 2 : 1,
    ignoreHTTPSErrors: true,
  });
  page.setDefaultTimeout(180_000);
  page.on("console", (message) => message.type() === "error" && found.errors.push(message.text()));
  page.on("pageerror", (error) => found.errors.push(error.message));
  page.on("request", (sent) => {
    const place = sent.url().replace(/^blob:/, "");
    found.fetched.push(place);
    if (!place.startsWith(request.url)) {
      found.elsewhere.push(place);
    }
  });
  const shoot = (name) =>
    request.screenshot && page.screenshot({ path: `${request.screenshot}-${name}.png` });
  const ready = () => page.waitForSelector("body[data-state=ready], #error:not([hidden])");

  if (request.older) {
    await page.addInitScript(() => delete WebAssembly.Suspending);
  }
  for (let visit = 0; visit < (request.visits ?? 1); visit++) {
    await page.goto(request.url);
    await page.waitForSelector("body[data-state=idle]");
    await page.evaluate(() => (document.body.dataset.ids = ""));
    await shoot("start");
    await page.check(`input[name=model][data-name="${request.model}"]`);
    if (request.threads) {
      await page.fill("#threads", String(request.threads));
    }
    if (request.endServer) {
      process.kill(request.endServer);
      await page.waitForTimeout(500);
    }
    await page.click("#load");
    await ready();
  }
  for (const [mode, text, limit] of request.said) {
    if (await page.isVisible("#error")) {
      break;
    }
    await page.check(`input[name=mode][value=${mode}]`);
    await page.locator("#limit").evaluate((input, value) => (input.value = value), limit);
    await page.fill("#prompt", text);
    await page.click("#send");
    if (request.stopAfter) {
      await page.waitForTimeout(request.stopAfter);
      await shoot("busy");
      await page.click("#stop");
    }
    await ready();
    if (await page.isHidden("#error")) {
      found.runs.push(await page.evaluate(() => window.lastRun));
    }
  }
  await shoot("end");
  found.answers = await page.locator("article:not(.asked) > p").allTextContents();
  found.error = (await page.isVisible("#error")) ? await page.textContent("#error") : null;
  found.notice = (await page.isVisible("#notice")) ? await page.textContent("#notice") : null;
  found.facts = (await page.locator("#facts dd").allTextContents()).join(", ");
  found.isolated = await page.evaluate(() => crossOriginIsolated);
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
