// Committed and provisional text of an answer as it forms. Usage: node client.js [ADDRESS [API_KEY]]
async function main(address = "http://127.0.0.1:8000", key = "none") {
  const response = await fetch(`${address}/v1/anytime/completions`, {
    method: "POST",
    headers: {"Content-Type": "application/json", Authorization: `Bearer ${key}`},
    body: JSON.stringify({prompt: "import os\nimport sys\n\n\ndef main(argv):\n", max_tokens: 48, temperature: 0}),
  });
  if (!response.ok) throw Error(await response.text());
  let committed = "", tail = {token_ids: [], text: ""}, rest = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = (rest + part).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(line => line.startsWith("data: {"))) {
      const event = JSON.parse(line.slice(6)), {token_ids, text} = event;
      if (event.type === "provisional") tail = event;
      if (event.type === "commit") {
        committed += text;
        const stands = token_ids.every((id, place) => id === tail.token_ids[place]) && tail.text.startsWith(text);
        tail = stands ? {token_ids: tail.token_ids.slice(token_ids.length), text: tail.text.slice(text.length)}
          : {token_ids: [], text: ""};
      }
      console.error(JSON.stringify({committed, provisional: tail.text}));
    }
  }
  console.log(committed);
}
main(...process.argv.slice(2));
