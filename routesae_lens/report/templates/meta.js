// What a feature is made of. Follows page.js in the same script; functions alone, because that one runs first.

// Every feature's meta-latents, strongest first, each with the number of latents and the features of this page that
// have it.
function addMetaLatents(features, byLatent) {
  for (const [number, among, having] of JSON.parse(document.getElementById("meta-data")?.textContent ?? "[]")) {
    for (const [latent, strength] of having) byLatent.get(latent).metas.push({ number, among, having, strength });
  }
  for (const one of features) one.metas.sort((a, b) => b.strength - a.strength);
}

function metaItem(one, { number, among, having, strength }, byLatent) {
  const others = having.filter(([latent]) => latent !== one.latent);
  const all = others.length ? element("a", { href: `#meta-${number}` }, `list the ${having.length} features here`) : "no other here";
  return element("li", {}, element("strong", {}, `Meta-latent ${number}`),
    ` strength ${strength.toFixed(2)}, in ${among.toLocaleString("en")} latents; `, all,
    element("ul", { class: "near" }, ...others.slice(0, 8).map(([latent, x]) => neighbour(latent, x, byLatent))));
}
