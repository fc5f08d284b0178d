#!/bin/sh
# The events of an answer as it forms, as they come. Usage: curl.sh [ADDRESS [API_KEY]]
curl -sN "${1:-http://127.0.0.1:8000}/v1/anytime/completions" \
  -H "Content-Type: application/json" -H "Authorization: Bearer ${2:-none}" \
  -d '{"prompt": "import os\nimport sys\n\n\ndef main(argv):\n", "max_tokens": 48, "temperature": 0,
       "anytime": {"mode": "tail"}}'
