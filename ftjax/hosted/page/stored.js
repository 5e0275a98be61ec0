// Models and files.

function modelActs(name) {
  const about = short(name);
  const remove = async () => {
    if (!(await sure("Delete the model?", "Delete", `${name}: its adapter is removed from the server and cannot be brought back.`))) return;
    await json(`/v1/models/${encodeURIComponent(name)}`, { method: "DELETE" });
    say(`${about} is deleted.`);
    await (wanted() ? look() : store());
  };
  return [
    link("Chat", `with ${about}`, `#chat=${encodeURIComponent(name)}`),
    button("Download adapter", about, () => save(`/v1/ftjax/models/${encodeURIComponent(name)}/adapter`, "adapter.zip")),
    button("Delete", about, remove, "danger"),
  ];
}

async function store() {
  const view = turn;
  const [models, files] = await Promise.all([json("/v1/models"), json("/v1/files?limit=1000")]);
  if (view !== turn) return;
  fill(element("models"), models.data.map(({ id, created, owned_by }) => {
    const what = holding("div", "what", made("p", short(id), "name"), made("p", owned_by === "system" ? "what all jobs can start from" : `${id} · ${time(created)}`, "detail"));
    const chat = [link("Chat", `with ${short(id)}`, `#chat=${encodeURIComponent(id)}`)];
    return holding("li", "", what, holding("div", "acts", ...(owned_by === "system" ? chat : modelActs(id))));
  }));
  element("no-files").hidden = files.data.length > 0;
  fill(element("files"), files.data.map((file) => {
    const what = holding("div", "what", made("p", file.filename, "name"), made("p", `${file.purpose} · ${size(file.bytes)} · ${time(file.created_at)} · ${file.id}`, "detail"));
    const remove = async () => {
      if (!(await sure("Delete the file?", "Delete", `${file.filename} (${file.id}): jobs that were made with it keep its rows.`))) return;
      await json(`/v1/files/${file.id}`, { method: "DELETE" });
      say(`${file.filename} is deleted.`);
      await store();
    };
    const train = button("Train on it", file.filename, () => {
      form.file = file;
      location.hash = "new";
      return check();
    });
    const download = button("Download", file.filename, () => save(`/v1/files/${file.id}/content`, file.filename));
    return holding("li", "", what, holding("div", "acts", file.purpose === "fine-tune" && train, download, button("Delete", file.filename, remove, "danger")));
  }));
}
