"""The OpenAI-compatible server: FastAPI in front of one or several tritonservers' text doors.

app.py      routes            schema.py     requests, field by field      errors.py    failures -> OpenAI's error objects
fleet.py    which server      answers.py    choices, completions          tools.py     tool calls in a model's text
            chat_answers.py   messages in, messages and calls out
qos.py      who goes first    interactive.py, sessions.py  LMDeploy's sessions   access.py    keys, metrics
hub.py      what several processes of one server have in common
"""
