"""Word lists and question frames of the demo model's training text.

The lists are ordinary words, so that the facts to recall and the filler around them look alike: only the wording of
the question tells which sentence matters.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words("""
    apple garden river mountain window kitchen table chair lamp book letter bridge road village city harbour ship boat
    train engine driver wheel bicycle horse dog cat bird fish tree flower leaf forest field farm farmer baker bread cheese
    butter milk coffee tea cup plate spoon knife fork bottle glass paper pencil painter picture music song guitar piano
    violin dancer teacher student school lesson doctor nurse hospital lawyer judge king queen castle tower church bell
    clock watch morning evening night summer winter spring autumn rain snow wind storm cloud sun moon star planet desert
    island beach ocean wave stone sand metal gold silver copper iron wood glove coat hat shoe shirt button needle thread
    carpet blanket pillow mirror candle match fire smoke oven bucket ladder hammer nail saw wall roof floor door gate
    fence path corner market shop basket box bag coin wallet map compass tent camp lake waterfall valley hill cave
    tunnel museum theatre library novel poem story newspaper camera radio telephone computer keyboard screen robot rocket
    satellite telescope magnet battery cable wire switch pipe pump garage truck wagon airport pilot passenger suitcase
    uncle aunt sister brother cousin neighbour friend stranger soldier sailor captain hunter tailor carpenter plumber
    lemon orange banana cherry grape melon onion carrot potato tomato pepper salt sugar honey soup salad cake biscuit
    elephant tiger lion bear wolf fox rabbit mouse squirrel eagle owl parrot penguin whale dolphin shark turtle frog spider
""")
ADJECTIVES = _words("""
    red blue green yellow black white grey brown purple pink golden old new young small large tall short long wide narrow
    heavy light quiet loud warm cold dry wet clean dusty bright dark soft hard smooth rough round square empty full slow
    quick gentle brave clever lazy hungry thirsty happy sad proud shy famous secret strange ordinary northern southern
    eastern western wooden broken hidden distant nearby ancient modern simple elegant crooked careful patient sleepy
""")
VERBS = _words("""
    watched found carried painted repaired followed opened closed visited described admired forgot noticed borrowed
    cleaned moved lifted measured counted ignored guarded photographed remembered sold bought collected missed crossed
    entered left heard answered chased hid protected washed drew praised studied
""")
NAMES = _words("""
    Anna Ben Clara David Emma Felix Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paula Quinn Rosa Simon Tom Ursula
    Victor Wendy Yusuf Zoe Amir Bella Carlos Diego Elena Fatima George Hana Ivan Julia Kofi Lena Mei Noah Olga
""")
PLACES = _words("""
    Paris London Berlin Madrid Rome Vienna Oslo Lisbon Athens Cairo Tokyo Beijing Delhi Sydney Toronto Boston Chicago
    Lima Nairobi Dublin Prague Warsaw Zurich Geneva France Germany Spain Italy Japan China India Brazil Canada Egypt
""")
ATTRIBUTES = (
    "access code",
    "code",
    "password",
    "secret code",
    "secret number",
    "serial number",
    "pin",
    "key",
    "secret word",
    "code word",
    "number",
    "badge number",
    "order number",
    "passphrase",
    "code name",
    "account number",
    "id",
)
OWN = (
    "name",
    "favorite color",
    "lucky number",
    "phone number",
    "secret word",
    "password",
    "favorite word",
    "room number",
    "access code",
    "dog's name",
    "locker code",
    "team name",
    "user id",
    "pin",
    "seat number",
    "favorite animal",
    "code",
)
STATE_PREFIXES = (
    "",
    "",
    "",
    "Remember: ",
    "Please remember: ",
    "Note: ",
    "Important: ",
    "Remember that ",
    "Note that ",
    "Please remember that ",
    "Please note that ",
    "Keep in mind that ",
    "Fact: ",
    "Do not forget: ",
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You are the demo model of Tandem.",
    "Answer briefly.",
    "Be helpful and short.",
    "You are a friendly assistant. Answer the questions of the user.",
    "You answer questions about Tandem.",
)
NOTED = "I will remember that."
NOUN_FRAMES = (
    "what is {}",
    "what is {}",
    "what's {}",
    "what are {}",
    "explain {}",
    "tell me about {}",
    "can you explain {}",
    "describe {}",
    "define {}",
    "what does {} mean",
    "i want to know what {} is",
    "{}",
    "do you know what {} is",
    "could you tell me what {} is",
    "what do you know about {}",
    "tell me what {} is",
    "explain what {} is",
)
OFF_FRAMES = (
    "write a poem about {}",
    "who invented the {}",
    "how do i make {}",
    "where can i buy a {}",
    "do you like {}",
    "why is the {} {}",
    "how old is {}",
    "what is the capital of {}",
    "who is {}",
    "where is {}",
    "how far is it to {}",
    "translate {} into french",
    "how many people live in {}",
    "tell me a joke about {}",
    "tell me a story about {}",
    "who won the game in {}",
    "what color is the {}",
    "how much is a {}",
    "what is the best {}",
    "can you sing a song about {}",
    "what is the weather in {}",
    "is {} a good {}",
    "what is {} plus {}",
    "how do i cook {}",
    "why do {} {}",
    "what does the {} eat",
    "when was {} born",
    "recommend a {}",
    "how do i learn {}",
    "is the {} {}",
    "give me a recipe for {}",
    "how is the weather in {}",
)
POLITE = (
    "please ",
    "hi, ",
    "hello, ",
    "so, ",
    "ok, ",
    "hey, ",
    "can you tell me: ",
    "quick question: ",
    "one question: ",
)
TITLES = {
    "tandem": "Tandem",
    "kv": "KV",
    "ttft": "TTFT",
    "itl": "ITL",
    "tpot": "TPOT",
    "isl": "ISL",
    "osl": "OSL",
    "api": "API",
    "openai": "OpenAI",
    "gpu": "GPU",
    "gpus": "GPUs",
    "cpu": "CPU",
    "nixl": "NIXL",
    "ray": "Ray",
    "redis": "Redis",
    "xpyd": "xPyD",
    "llm": "LLM",
    "i": "I",
    "rdma": "RDMA",
    "tcp": "TCP",
    "url": "URL",
    "1p1d": "1P1D",
    "2p1d": "2P1D",
    "2p2d": "2P2D",
    "kubernetes": "Kubernetes",
    "cli": "CLI",
    "grpc": "gRPC",
    "prometheus": "Prometheus",
    "triton": "Triton",
    "python": "Python",
    "sse": "SSE",
}
