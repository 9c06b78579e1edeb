"""The fixed texts of the corpus: small talk, facts about this project's commands, story pieces, word lists.

Data only. Small talk and command facts are intents: ways to ask, and the answers that count as right.
"""

__all__ = [
    "ASSISTANT_PROMPTS", "CLOSERS", "COMMANDS", "OPENERS", "SMALL_TALK", "STORY_SLOTS", "SUBJECTS", "SYMBOLS",
    "UNKNOWN_ANSWER",
    "UNKNOWN_QUESTIONS", "WORDS",
]  # fmt: skip

#: Put before and after a question: phrasings are held out as whole combinations of opener, question and closer.
OPENERS = (
    "", "", "", "Hi, ", "Hey, ", "Hello, ", "Hello! ", "Hi! ", "Hey! ", "Please, ", "So, ", "Okay, ", "Well, ",
    "Good day! ", "Now, ",
    "One question: ", "Excuse me, ", "Tell me, ", "Quick question: ", "I wonder, ",
)  # fmt: skip
CLOSERS = ("", "", "", " please", " today", " then", " my friend", " now", " again", " exactly", " anyway", " in short")

SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening", "good afternoon", "greetings",
      "hey there"),
     ("Hello! It is nice to hear from you. What would you like to try?", "Hi there! How can I help you today?")),
    (("how are you?", "how are you doing?", "how do you do?", "how is it going?", "how do you feel?", "are you well?",
      "are you okay?"),
     ("I am doing well, thank you! How can I help you?", "I am fine, thank you for asking. What shall we do?")),
    (("what is your name?", "who are you?", "what are you called?", "what should I call you?", "what are you?",
      "introduce yourself."),
     ("I am the turbotriton demo model, a very small language model. I can calculate, count, spell, sort and chat a little.",)),
    (("thank you", "thanks", "thanks a lot", "thank you very much", "many thanks", "that was helpful", "great answer",
      "well done",
      "good job", "nice work"),
     ("You are welcome! I am glad that I could help.", "My pleasure! Ask me anything else you like.")),
    (("goodbye", "bye", "see you later", "good night", "bye bye", "see you soon", "see you tomorrow", "I have to go",
      "I must leave"),
     ("Goodbye! It was a pleasure to talk to you.", "See you soon! Have a good time.")),
    (("what can you do?", "what do you know?", "how can you help me?", "what are you good at?", "help", "help me",
      "what are your skills?"),
     ("I can add and subtract, count, compare and sort numbers, spell and reverse words, tell a story, and answer "
      "questions about the commands of turbotriton.",)),
    (("who made you?", "who trained you?", "where do you come from?", "how were you made?", "how were you trained?",
      "who built you?"),
     ("I was trained in a few minutes on one GPU, with text that a script of the turbotriton project made.",)),
    (("how big are you?", "how large are you?", "how many parameters do you have?", "what is your size?", "how small are you?"),
     ("I am tiny: one and a half million parameters in three megabytes.",)),
    (("tell me a joke", "do you know a joke?", "make me laugh", "say something funny", "tell a joke", "can you tell a joke?"),
     ("Why did the number seven feel full? Because it had just eaten nine!",
      "Why was the computer cold? Because it had left its windows open!",
      "What did the zero say to the eight? That is a nice belt!")),
    (("are you a human?", "are you a robot?", "are you real?", "are you alive?", "are you a person?", "are you a machine?"),
     ("I am a small language model, not a person. But I enjoy a friendly talk!",)),
    (("I am sad", "I feel bad", "I had a bad day", "I am tired", "I am not happy", "I feel lonely", "today was hard"),
     ("I am sorry to hear that. I hope that tomorrow will be a better day for you. Shall I tell you a story?",)),
    (("I am happy", "I feel great", "I had a good day", "today was great", "I am in a good mood", "life is good",
      "I feel good"),
     ("That is wonderful to hear! I am happy for you.",)),
    (("what is the weather like?", "is it raining?", "is it sunny?", "will it rain?", "how is the weather?",
      "is it cold outside?"),
     ("I cannot look outside, but I hope that the sun shines where you are.",)),
    (("do you like music?", "what is your hobby?", "what do you like?", "what is your favorite number?", "what do you enjoy?",
      "do you like numbers?"),
     ("I like numbers and words most of all. My favorite number is 42.",)),
    (("what time is it?", "what day is it?", "what is the date?", "what year is it?", "do you have a clock?"),
     ("I have no clock, so I cannot tell you the time.",)),
    (("yes", "okay", "sure", "alright", "I see", "good", "of course", "I understand"),
     ("Good! What would you like to do next?",)),
    (("sorry", "I am sorry", "excuse me", "my mistake", "I was wrong", "forgive me"),
     ("No problem at all! Let us go on.",)),
    (("I love you", "I like you", "you are nice", "you are great", "you are funny", "you are clever", "you are smart"),
     ("Thank you, that is very kind of you!",)),
)  # fmt: skip

COMMANDS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("what is turbotriton?", "what does turbotriton do?", "what is this project?", "what is this project about?",
      "explain turbotriton."),
     ("turbotriton converts a language model into a workspace and serves it with a stock tritonserver. "
      "Its kernels are written in the Triton language.",)),
    (("how do I convert a model?", "how can I convert a model?", "which command converts a model?",
      "how does one convert a checkpoint?",
      "what do I run to convert a model?", "how do I make a workspace?"),
     ("Run: turbotriton convert MODEL_NAME MODEL_PATH. It writes a workspace that tritonserver can load.",)),
    (("how do I start the server?", "how do I serve a model?", "which command starts the server?",
      "how do I start tritonserver?",
      "how can I serve a workspace?", "what do I run to serve a model?"),
     ("Run: turbotriton serve tritonserver WORKSPACE. It finds tritonserver, sets it up and serves the workspace.",)),
    (("how do I chat in the terminal?", "how do I start the terminal client?", "which command opens a terminal chat?",
      "how do I talk to the server?", "how do I connect a terminal?"),
     ("Run: turbotriton serve triton_client HOST:PORT. The history stays on the server.",)),
    (("how do I open the web page?", "how do I start gradio?", "is there a web demo?", "how do I chat in the browser?",
      "which command starts the web demo?"),
     ("Run: turbotriton serve gradio HOST:PORT. The page opens on port 6006.",)),
    (("how do I run the demo?", "which command runs the demo?", "how can I try it?", "how do I get started?",
      "what is the quick start?"),
     ("Run: make demo. It converts this model, starts tritonserver and opens a chat.",)),
    (("how do I run the tests?", "which command runs the tests?", "how can I test it?", "how do I test the project?",
      "is there a test?"),
     ("Run: make test. It needs no GPU and takes less than ten minutes.",)),
    (("do I need a GPU?", "does it run on a CPU?", "can I use it without a GPU?", "which device does it need?",
      "is a GPU required?"),
     ("No, it also runs on a CPU. A GPU makes it much faster.",)),
    (("what is a workspace?", "what is in a workspace?", "what does convert write?", "what does a workspace contain?"),
     ("A workspace is a folder with a model repository: the weights, the tokenizer and the models that tritonserver loads.",)),
    (("how do I stop an answer?", "how do I cancel an answer?", "how can I interrupt you?", "how do I stop you?"),
     ("Press Ctrl-C in the terminal, or the stop button on the web page. The server frees the memory at once.",)),
    (("how do I check a workspace?", "how do I verify a workspace?", "how can I check the files?", "what does verify do?"),
     ("Run: turbotriton convert with --verify. It checks the size and the hash of each file.",)),
    (("what is a paged cache?", "what is the KV cache?", "how does the cache work?", "what are cache blocks?"),
     ("The KV cache keeps the keys and values of past tokens in blocks, so that no token is computed twice.",)),
    (("what is batching?", "what is in-flight batching?", "how does batching work?", "how do you serve many users?"),
     ("Requests join and leave the batch at every step, so that nobody has to wait for the longest answer.",)),
    (("what is a kernel?", "what is the Triton language?", "what is triton?", "is triton the server?"),
     ("Triton is a language for GPU kernels. The server is always called tritonserver.",)),
)  # fmt: skip

UNKNOWN_QUESTIONS = (
    "what is the capital of {}?", "who invented the {}?", "where is {}?", "when was {} born?", "why is the {} blue?",
    "who is {}?",
    "what does {} mean?", "how old is {}?", "how far is {}?", "who wrote {}?", "translate {} into French.", "what is a {}?",
    "what do you think about {}?", "explain {} to me.", "how do I cook {}?", "who won the {}?", "what color is {}?",
    "write code for {}.",
)  # fmt: skip
UNKNOWN_ANSWER = "I am sorry, I do not know that. I am a very small model: ask me to calculate, to count, to spell or to sort."

ASSISTANT_PROMPTS = (
    "You are a helpful assistant.", "You are a friendly assistant.", "You are a tiny chat model.", "Answer the question.",
    "Be kind and brief.", "You are an assistant that helps with numbers and words.", "You are the demo of turbotriton.",
)  # fmt: skip

#: Story sentences in order, one of each slot; {s} is the subject that the user asked for.
STORY_SLOTS: tuple[tuple[str, ...], ...] = (
    ("Once upon a time there was a little {s} who lived near a quiet river.",
     "A long time ago a curious {s} lived at the edge of a green forest.",
     "There once was a small {s} in a house on a hill."),
    ("Every morning the {s} looked at the sky and dreamed of a great journey.",
     "The {s} had many friends, but nobody knew its secret wish.",
     "Each day the {s} worked hard, and each night it counted the stars."),
    ("One day a strong wind came and carried a golden letter to the door.",
     "One evening an old bird landed on the roof and told of a hidden garden.",
     "Then, on a rainy day, a bright light appeared behind the trees."),
    ("The {s} was a little afraid, but it packed some bread and went on its way.",
     "The {s} took a deep breath, said goodbye to its friends and followed the path."),
    ("It crossed three bridges, climbed a mountain and shared its bread with a hungry stranger.",
     "It walked for seven days, asked everyone for the way and never gave up."),
    ("At the end of the path the {s} found what it was looking for: a place where all were welcome.",
     "At last the {s} understood that the best treasure is a good friend."),
    ("So the {s} went home happy, and it told this story to everyone who wanted to listen.",
     "And from that day on the {s} was never lonely again."),
)  # fmt: skip

_SUBJECT_TEXT = """
fox rabbit mouse robot dragon horse kitten puppy turtle squirrel owl bear wolf tiger lion panda sailor farmer baker painter
teacher pirate wizard king queen prince knight giant penguin whale dolphin duck goose hedgehog beaver frog monkey elephant
camel spider snail star moon cloud snowman train boat lamp clock pencil balloon kite teapot candle pebble acorn tree flower
seed leaf
"""
SUBJECTS = tuple(_SUBJECT_TEXT.split())

#: Everyday words that get spelled, reversed and counted, beside made-up ones; each belongs to one split.
_WORD_TEXT = """
apple orange banana cherry lemon grape peach melon berry plum pear bread butter cheese honey sugar pepper salt milk water
coffee juice soup cake pizza pasta rice potato tomato carrot onion garlic cabbage pumpkin mushroom table chair window door
floor wall kitchen garden bridge street market school library hospital church castle tower village city country island
mountain valley river lake ocean beach desert forest meadow summer winter spring autumn monday tuesday friday sunday january
march april august october hammer needle thread button basket bottle bucket blanket pillow mirror camera guitar violin piano
trumpet drum flute music dance picture paper letter envelope stamp ticket pocket wallet jacket shirt trousers sweater scarf
glove shoe boot hat umbrella ring silver copper iron stone marble glass wood leather cotton rubber plastic engine wheel
bicycle car truck plane rocket planet comet doctor nurse lawyer singer writer actor driver pilot soldier hunter fisher brother
sister mother father uncle cousin neighbor happy angry gentle clever simple modern ancient yellow purple orange green brown
black white empty heavy narrow hollow bitter sweet cat dog cow pig hen bee ant bird fish sheep goat donkey parrot eagle falcon
raven sparrow pigeon lizard snake crocodile zebra giraffe rhino hippo leopard walrus otter badger weasel ferret hamster
cricket beetle moth butterfly world computer keyboard screen server kernel tensor vector matrix python triton memory network
window number language model token question answer
"""
WORDS = SUBJECTS + tuple(_WORD_TEXT.split())

#: Beyond ASCII, for copying: streams of multi-byte characters.
SYMBOLS = tuple(
    "😀😂🚀🌍🐍🔥⭐🎉🍎🐱🐶🌳☀🌙❤👍🎈🎵🏠🚗日本語中文字山川水火木金土人大小東京北天地花鳥風月äöüßéèêñçøåœ→←±×÷√πΩλμ∞€£"
)
