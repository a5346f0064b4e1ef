"""A model behind an address that speaks OpenAI's chat completions.

    app.py        routes, the key, the limit of a body                       what a client sees
    protocol.py   a request, field by field; whatever it may not say is an error that names the field
    prompts.py    request ─► messages of the processor, tools, sampling       in threads, off the event loop
    service.py    the gate, the time limit, n attempts ─► pieces of answers   uses any `Generates`, and the agent's loop
    answers.py    pieces ─► completion, or chunks of a stream
    calls.py      tool_choice as a constraint
    steps.py      what tools that the server runs did for an answer
    metrics.py    /metrics
    lifetime.py   listen; on SIGTERM refuse what is new, finish what runs, end

Nothing here is global: `app.make_app` takes the engine, the processor and the settings.
"""
