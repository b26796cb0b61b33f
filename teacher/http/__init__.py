"""A teacher behind somebody else's server: from requests to completions over HTTP, with nothing lost that was paid for.

`http_engine` (one folder up) is what the rest of the project sees. Below it, in the order in which a request travels:

    listening    one event loop, run by the synchronous generator that the caller iterates; pulls requests when there is room
    asking       one request: its attempts, its continuations, its partial outputs, until it is a completion
    asks         what is sent: the JSON body and the headers
    servers      which server is asked next: health, load, the model that each says it serves; `window`: how many at a time
    connection   the only module that imports aiohttp: one pool of kept-alive connections
    waits        how long to wait before asking again (pure)
    raw          the bytes that are kept, before anything parses them: one line of ours and the server's body
    replies      what a body or a stream of events says, whatever server wrote it (pure)
    reading      from kept bytes to a completion: the one parser, for replies that just came and for replies of last week
"""
