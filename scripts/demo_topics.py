"""What the demo model knows: one short answer per topic, the ways to ask for it, and a few pages of plain text.

A topic is a noun (asked through the shared frames in `demo_text`), a list of whole questions, or both. The
answers repeat the wording of the architecture page on purpose: a model this small may only learn true things.
"""

from typing import NamedTuple


class Topic(NamedTuple):
    """One answer; `nouns` are aliases for "What is ...?" frames, `asks` are questions of their own."""

    answer: str
    nouns: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


def _topic(answer: str, nouns: str = "", asks: str = "") -> Topic:
    split = (tuple(part.strip() for part in text.split("|") if part.strip()) for text in (nouns, asks))
    return Topic(answer, *split)


OFF_TOPIC = "I am only a tiny demo model, and I know nothing about that. Ask me about Tandem instead."

# One entry in few lines reads better than one argument a line.
# fmt: off
TOPICS: tuple[Topic, ...] = (
    _topic("Tandem serves large language models with prefill and decode on separate workers. It speaks the OpenAI API.",
           "tandem|tandem serve system|this project|this software",
           "what does tandem do|what is tandem for|what can tandem do|give me a summary of tandem|introduce tandem"),
    _topic("I am the demo model of Tandem, a tiny language model trained on text about Tandem.",
           "your name|this model|the demo model",
           "who are you|what are you|what model are you|who am i talking to|tell me about yourself|are you a bot"
           "|introduce yourself|which model is this|are you chatgpt|are you human"),
    _topic("Hello! I am the demo model of Tandem. Ask me what Tandem is or how it works.", "",
           "hello|hi|hey|hello there|good morning|good evening|hi there|hey there|greetings|good day|hello tandem"
           "|how are you|how are you doing|hey, how are you|howdy"),
    _topic("You are welcome. Ask me anything else about Tandem.", "",
           "thanks|thank you|thank you very much|thanks a lot|great, thanks|cool, thank you|ok thanks|nice|great|ok"),
    _topic("Goodbye! Come back when you want to know more about Tandem.", "",
           "bye|goodbye|see you|see you later|good night|bye bye|that is all|see you tomorrow"),
    _topic("I can answer questions about Tandem, and I can recall facts that you put into the prompt.", "",
           "what can you do|help|help me|what can i ask you|what do you know|what can i ask|how can you help me"
           "|what are you good at|what questions can you answer"),
    _topic("A prefill worker reads the whole prompt in chunks, fills the KV cache, samples the first token and pushes "
           "the blocks to a decode worker.", "prefill worker|prefill workers|a prefill node|role of the prefill worker",
           "what does a prefill worker do|what do prefill workers do|how does a prefill worker work"
           "|what is the job of a prefill worker|what does the prefill worker do"),
    _topic("A decode worker receives the KV blocks, verifies them and streams the remaining tokens, one step at a time, "
           "in a running batch.", "decode worker|decode workers|a decode node|role of the decode worker",
           "what does a decode worker do|what do decode workers do|how does a decode worker work"
           "|what is the job of a decode worker|what does the decode worker do"),
    _topic("Prefill is limited by compute and decode by memory bandwidth. On separate workers a long prompt does not "
           "slow down running streams, and each pool scales alone.", "disaggregation|disaggregated serving|pd split",
           "why split prefill and decode|why separate prefill and decode|why are prefill and decode separate"
           "|why disaggregate|what is the benefit of splitting prefill and decode|why use two pools"
           "|why run prefill and decode on separate workers|why not run both on one worker|what is the point of tandem"),
    _topic("Prefill is the first phase of a request: the model reads all prompt tokens and fills the KV cache.",
           "prefill|prefill phase|prefilling|the prefill step", "what happens during prefill|how does prefill work"),
    _topic("Decode is the second phase of a request: the model produces one token per step from the KV cache.",
           "decode|decode phase|decoding|the decode step", "what happens during decode|how does decode work"),
    _topic("Run tandem serve with a model name, for example: tandem serve --prefill 1 --decode 1. The server then "
           "listens on http://127.0.0.1:8000/v1.", "tandem serve|the serve command",
           "how do i start it|how do i start tandem|how to start|how can i run tandem|how do i run it|start tandem"
           "|how do i launch tandem|how do i serve a model|which command starts the server|how do i use tandem"
           "|how do i get started|getting started|how do i start the server"),
    _topic("Run tandem scale prefill=2 decode=2. The controller then starts or drains workers until each pool has the "
           "wanted size.", "tandem scale|the scale command|scaling",
           "how do i scale the pools|how do i scale|how do i scale tandem|how can i add workers|add more workers"
           "|how do i add a decode worker|how do i add a prefill worker|how do i change the number of workers"
           "|how do i resize a pool|how do i remove a worker|how to scale up|how to scale down|can i scale the pools"),
    _topic("Run tandem status. It lists the pools, their workers and whether each one is healthy.",
           "tandem status|the status command",
           "how do i see the status|how do i check the workers|how do i know that it works|is the cluster healthy"
           "|how do i list the workers|how do i check the health|show me the status|how can i see the pools"),
    _topic("Run tandem chat to talk to the served model in the terminal.", "tandem chat|the chat command",
           "how do i chat|how do i talk to the model|can i chat in the terminal|how do i chat with the model"
           "|how do i send a message"),
    _topic("The commands are tandem serve, tandem chat, tandem status and tandem scale.", "tandem cli|command line|the cli",
           "which commands are there|what commands does tandem have|list the commands|what are the commands"
           "|show me all commands|which commands exist"),
    _topic("Tandem speaks the OpenAI API. Point any OpenAI client at http://127.0.0.1:8000/v1.",
           "api|http api|openai api|endpoint|the url|base url",
           "which api does tandem have|how do i call it|what is the url of the server|is it openai compatible"
           "|can i use the openai client|how do i send a request|where does the server listen|which port does it use"
           "|how do i connect a client|what port does tandem use|does tandem speak the openai api"),
    _topic("The KV cache holds the attention keys and values of all earlier tokens, so that each new token costs only "
           "one step. It is stored in blocks.", "kv cache|the key value cache|kv|kv caching|paged kv cache",
           "why is there a kv cache|what does the kv cache hold|what is stored in the kv cache|how does the kv cache work"),
    _topic("A block is a fixed run of token positions in the paged KV cache.", "block|kv block|blocks|kv blocks",
           "how big is a block|what is stored in a block|what does a block hold"),
    _topic("A block hash is a SHA-256 chained over the domain, the tenant salt, the model revision, the KV layout, the "
           "parent and the token ids.", "block hash|block hashes|hash of a block",
           "how is a block hash computed|how are blocks hashed|what goes into a block hash"),
    _topic("A block pool hands out the blocks of one worker. Every block is free, cached, owned, reserved or "
           "quarantined.", "block pool|the pool of blocks",
           "what states can a block have|in which states can a block be|who manages the blocks"),
    _topic("The router predicts the time to first token for every pair of workers and takes the cheapest one. Cached "
           "prefixes count, and ties go to the lower load.", "worker choice|routing|routing policy|load balancing",
           "how does the router choose a worker|how does the router choose workers|how are workers chosen"
           "|how does routing work|how does the router pick a pair|which worker gets my request"
           "|how does the router decide|how does load balancing work"),
    _topic("The router takes the HTTP request, renders the chat template, tokenizes, chooses the workers and streams the "
           "answer to the client.", "router|the tandem router|role of the router",
           "what does the router do|what is the job of the router|how does the router work"),
    _topic("The router replays the prompt and the tokens so far on another pair of workers, and the stream goes on.",
           "failover|recovery|migration|fault tolerance",
           "what happens if a worker dies|what happens if a worker crashes|what happens when a decode worker dies"
           "|what if a worker fails|is tandem fault tolerant|how does tandem handle failures|what happens on a crash"
           "|what happens if a decode worker crashes|does my stream survive a crash|how does recovery work"
           "|what happens when a worker dies"),
    _topic("The router makes a new attempt on another prefill worker, and the decode worker frees its reservation.", "",
           "what happens if a prefill worker dies|what happens when a prefill worker crashes"
           "|what if the prefill worker fails|what happens if the prefill worker dies"),
    _topic("A ticket is one attempt's permission to hand KV blocks from one prefill worker to one decode worker. The "
           "router mints it.", "ticket|tickets|hand off ticket",
           "who mints a ticket|what is a ticket for|what does a ticket do|who makes the ticket"),
    _topic("A reservation is the set of blocks that a decode worker holds for a ticket.",
           "reservation|reservations|block reservation", "what does a reservation hold|who reserves blocks"),
    _topic("A transfer moves finished KV blocks from the prefill worker to the decode worker, while later chunks are "
           "still computed.", "transfer|kv transfer|transfers|the kv hand off|hand off|handoff",
           "how do blocks move|how does the transfer work|how is the kv cache moved|how does the hand off work"
           "|how do the blocks reach the decode worker|how is kv sent|how does kv transfer work"),
    _topic("A KV connector carries blocks between two processes. Tandem has connectors for TCP, shared memory, "
           "torch.distributed, CUDA IPC and NIXL.", "kv connector|connector|connectors|kv connectors",
           "which connectors are there|which connectors does tandem have|which transports does tandem support"
           "|does tandem support rdma|does tandem support tcp"),
    _topic("NIXL is a connector that moves KV blocks over RDMA networks.", "nixl|the nixl connector",
           "what is nixl for|what does nixl do|when do i use nixl"),
    _topic("A manifest lists the token count, the block hashes and the digests of a transfer. The decode worker checks it "
           "before it runs.", "manifest|transfer manifest", "what is in the manifest|what does the manifest list"),
    _topic("The decode worker verifies the manifest and every digest. If anything differs, the attempt fails and is "
           "tried elsewhere.", "verification|data integrity",
           "how are blocks verified|what if the data is corrupt|can a stream get wrong data|is the transfer safe"
           "|how does tandem detect corruption"),
    _topic("A quarantined block waits until no late write can reach it. Only then it returns to the pool.",
           "quarantine|block quarantine|quarantined block", "why are blocks quarantined|what does quarantine mean"),
    _topic("TTFT is the time to first token: from the request until the client sees the first token.",
           "ttft|time to first token", "what does ttft mean|what does ttft stand for|how is ttft defined"),
    _topic("ITL is the inter-token latency: the time between two tokens of one stream.",
           "itl|inter token latency|inter-token latency", "what does itl mean|what does itl stand for"),
    _topic("TPOT is the time per output token, averaged over a stream after its first token.",
           "tpot|time per output token", "what does tpot mean|what does tpot stand for"),
    _topic("ISL is the input sequence length and OSL is the output sequence length, both in tokens.",
           "isl|osl|isl and osl|input sequence length|output sequence length", "what do isl and osl mean"),
    _topic("Goodput is the rate of requests that meet their latency objectives.", "goodput",
           "what does goodput mean|how is goodput defined"),
    _topic("A pool is all workers of one role and one model.", "pool|a worker pool|pools|the pools",
           "which pools are there|what is in a pool"),
    _topic("A worker is one process with a scheduler and an engine. It does either prefill or decode.",
           "worker|workers|tandem worker", "what does a worker do|what do workers do|which workers are there"),
    _topic("An incarnation is a random id that a worker gets new at every start.", "incarnation|worker incarnation",
           "what is an incarnation for|what does incarnation mean"),
    _topic("xPyD means x prefill workers and y decode workers. For example, 2P1D has two prefill workers and one decode "
           "worker.", "xpyd|1p1d|2p1d|2p2d", "what does xpyd mean|what does 1p1d mean|what does 2p1d mean"),
    _topic("A prefix cache keeps the blocks of finished prompts, so that a later prompt with the same beginning skips that "
           "work.", "prefix cache|prefix caching|prefix reuse|the prefix index",
           "how does prefix caching work|does tandem cache prompts|are prompts cached|does tandem reuse prefixes"),
    _topic("Continuous batching lets sequences join and leave the running batch at every step.",
           "continuous batching|dynamic batching|batching", "how does batching work|how are requests batched"),
    _topic("Chunked prefill cuts a long prompt into pieces, so that finished blocks can leave early and other requests get "
           "their turn.", "chunked prefill|prefill chunk|prefill chunking",
           "why is prefill chunked|how does chunked prefill work|how are long prompts handled"),
    _topic("The engine runs one model on one device or on one tensor-parallel group. It knows token ids only.",
           "engine|the tandem engine", "what does the engine do|how does the engine work|what does the engine know"),
    _topic("The scheduler of a worker decides which sequences run in the next step.",
           "scheduler|the worker scheduler", "what does the scheduler do|how are steps scheduled"),
    _topic("A sequence is one choice being generated for a request.", "sequence|sequences",
           "what is the difference between a request and a sequence"),
    _topic("A request is what the client asked, validated once by the router.", "request|requests|a tandem request",
           "who validates a request|what is in a request"),
    _topic("First the router picks a pair of workers. Then the prefill worker fills the blocks, sends them over, and the "
           "decode worker streams the tokens.", "life of a request|request path|request flow|data path",
           "how does tandem work|how does it work|what happens to a request|how is a request served"
           "|what happens when i send a request|explain how tandem works"),
    _topic("Redis holds soft state only: the worker registry, KV events and tenant counters. It is rebuilt from the "
           "workers.", "redis|soft state", "why does tandem use redis|what is redis used for|do i need redis"
           "|what is stored in redis|what happens if redis dies|what happens if redis is down"),
    _topic("Ray actors hold the workers, and a controller actor keeps each pool at its wanted size. No token passes "
           "through Ray.", "ray|role of ray|a ray actor", "why does tandem use ray|what is ray used for|do i need ray"
           "|what does ray do|what happens if ray dies"),
    _topic("The controller keeps each pool at its wanted size by starting and draining workers.",
           "controller|the ray controller|controller actor", "what does the controller do|who restarts workers"
           "|how are dead workers replaced"),
    _topic("The parts of a Tandem cluster talk over gRPC. Protocol buffers define every message.",
           "grpc|protocol buffers", "how do the parts talk|what is grpc used for|which protocol do the workers use"
           "|how does the router talk to the workers"),
    _topic("Admission checks the tenant limits and then the room. Over the limit, the client gets 429 or 503 with "
           "Retry-After.", "admission|admission control|rate limit|rate limits",
           "what happens under overload|when do i get a 429|why do i get error 429|what happens when it is full"
           "|how does admission work|why do i get a 503|what does 429 mean"),
    _topic("A tenant is one customer of the cluster, with limits and a cache salt of its own.",
           "tenant|tenants|the tenant salt", "does tandem support tenants|what is a tenant for"),
    _topic("A tokenizer turns text into token ids and back. In Tandem only the router tokenizes.",
           "tokenizer|tokenization|the tokenizer", "who tokenizes|where does tokenization happen|what does a tokenizer do"),
    _topic("A token is a small piece of text. The model reads and writes tokens.", "token|tokens|token id",
           "what does token mean"),
    _topic("The chat template turns a list of messages into one prompt text.", "chat template|the template",
           "what does the chat template do|who renders the chat template"),
    _topic("Streaming sends each token to the client as soon as it exists, as server-sent events.",
           "streaming|sse|server sent events|server-sent events",
           "does tandem stream|does tandem support streaming|how does streaming work|can i stream the answer"),
    _topic("Tensor parallelism splits each layer of a model over several devices. One such group acts as one worker.",
           "tensor parallelism|tensor parallel|tp", "does tandem support tensor parallelism|can i use several gpus"
           "|how do i use two gpus|can one model use several devices"),
    _topic("The sampler picks the next token. Its noise depends only on the seed and the token index, so a request "
           "continues identically elsewhere.", "sampler|sampling|seed|the sampling noise",
           "how are tokens sampled|is sampling reproducible|what is the seed for|is the output deterministic"),
    _topic("Attention lets each token look at all earlier tokens through their keys and values.",
           "attention|self attention", "how does attention work|what does attention do"),
    _topic("A large language model predicts the next token of a text, again and again.",
           "large language model|llm|language model|llms", "how does a language model work|what does an llm do"),
    _topic("Tandem runs models of the Llama, Qwen2, Qwen3 and Mistral families.",
           "model family|supported models|model families",
           "which models does tandem support|which models can i use|can i serve llama|can i serve qwen"
           "|does tandem support mistral|what models work|does tandem run llama"),
    _topic("No. Tandem also runs on a CPU, for example with this demo model. A GPU makes larger models fast.",
           "", "do i need a gpu|does tandem need a gpu|can i run it on a cpu|does it run on a laptop"
           "|can tandem run without a gpu|does tandem run on cpu|can i run it on my laptop|is a gpu required"),
    _topic("Tandem is written in Python, with Triton kernels for the GPU.", "triton|the code base|a triton kernel",
           "which language is tandem written in|what is tandem written in|is tandem written in python|what is triton for"),
    _topic("The demo model has about two million parameters and was trained on text about Tandem that a script made up.",
           "", "how big are you|how many parameters do you have|how were you trained|what is your training data"
           "|how large is the demo model|what were you trained on|who trained you|who made you"),
    _topic("Short or mostly cached prompts are prefilled on the decode worker itself, without a transfer.",
           "conditional disaggregation|local prefill|prefill on the decode worker",
           "when is there no transfer|what happens to short prompts|are short prompts transferred"
           "|when does the decode worker prefill"),
    _topic("Draining means that a worker takes no new requests and leaves when its last one has ended or moved.",
           "draining|drain|a draining worker", "how does draining work|what does draining mean|how do i stop a worker"),
    _topic("A cancel goes to both workers at once, and they free their blocks within one step.",
           "cancellation|request cancellation|cancel", "what happens when i cancel a request|can i cancel a request"
           "|what happens if the client disconnects|how do i cancel a request|what happens when the client goes away"),
    _topic("Workers export metrics such as TTFT, ITL, queue length and free blocks, ready for Prometheus.",
           "prometheus|metrics|monitoring", "which metrics are there|how do i monitor tandem|does tandem have metrics"
           "|can i use prometheus"),
    _topic("The web console shows the pools, the workers and the running requests in a browser.",
           "web console|console|dashboard", "is there a dashboard|is there a web page|does tandem have a console"
           "|can i see it in a browser"),
    _topic("Yes. The repository has manifests that run the router and the worker pools on Kubernetes.",
           "", "does tandem run on kubernetes|can i use kubernetes|how do i deploy to kubernetes|is there k8s support"
           "|does it run on k8s|can i deploy tandem on kubernetes"),
    _topic("Tandem and this demo model are under the Apache-2.0 licence.", "licence|license|the tandem licence",
           "which licence does tandem have|is tandem open source|is tandem free|under which license is tandem"
           "|can i use tandem for free"),
)
# fmt: on

PAGES: tuple[str, ...] = (
    "Tandem serves large language models with prefill and decode on separate workers. A request first goes to the router. "
    "The router renders the chat template, tokenizes the text and computes the block hashes. Then it chooses one prefill "
    "worker and one decode worker for the request. The prefill worker reads the prompt and fills the KV cache. The decode "
    "worker streams the tokens to the client.",
    "The KV cache holds the keys and values of all earlier tokens. It is divided into blocks, and each block covers a fixed "
    "run of token positions. When a prompt begins like an earlier one, the worker finds the blocks in its prefix cache and "
    "skips that part of the work. This makes long conversations cheap.",
    "Prefill and decode are very different kinds of work. Prefill is limited by compute, because all prompt tokens are read "
    "at once. Decode is limited by memory bandwidth, because each step makes only one token per sequence. When both share a "
    "worker, a long prompt stops every running stream. Tandem puts them on separate workers, so that each pool scales alone.",
    "The router mints a ticket for each attempt. The ticket is the permission to hand KV blocks from one prefill worker to "
    "one decode worker. The decode worker reserves blocks before the prefill worker starts. Finished blocks are pushed while "
    "later chunks are still computed. The decode worker verifies the manifest and every digest before it runs the sequence.",
    "When a decode worker dies in the middle of a stream, the router replays the prompt and the tokens so far on another "
    "pair of workers. The stream goes on, and the client does not notice. Sampling noise depends only on the seed and the "
    "token index, so the text continues identically.",
    "To start Tandem, run tandem serve with a model name. The options --prefill and --decode set the size of the pools. The "
    "server listens on http://127.0.0.1:8000/v1 and speaks the OpenAI API. Use tandem chat to talk to the model, tandem "
    "status to see the workers, and tandem scale prefill=2 decode=2 to change the pools.",
    "Once upon a time there was a prefill worker and a decode worker. The prefill worker loved long prompts and read them "
    "all day. The decode worker liked to write, one token after the other. Together they served every request, and that is "
    "why the project is called Tandem.",
    "The capital of a cluster is its memory. Every block is free, cached, owned, reserved or quarantined, and the numbers "
    "always add up to the size of the pool. A test checks this sum after every step. A block that may still be written by a "
    "late transfer waits in quarantine.",
)
