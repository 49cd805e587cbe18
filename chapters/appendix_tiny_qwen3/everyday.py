"""Words for questions that lie outside Tiny Qwen3's world, which it is to decline."""

THINGS = tuple(
    "a banana|an apple|a bicycle|a violin|a piano|a castle|a volcano|a river|a mountain|an island|"
    "a forest|a desert|a storm|a rainbow|a planet|the moon|the sun|a star|a galaxy|gravity|an atom|"
    "a molecule|oxygen|water|gold|silver|iron|salt|sugar|bread|cheese|butter|coffee|tea|wine|beer|"
    "soup|pizza|pasta|rice|a potato|a tomato|an onion|a carrot|a lemon|a cat|a dog|a horse|a cow|"
    "a sheep|a lion|a tiger|an elephant|a giraffe|a whale|a shark|a dolphin|an eagle|an owl|a bee|"
    "a spider|a butterfly|a dinosaur|a unicorn|a dragon|a king|a queen|a president|a parliament|"
    "democracy|a law|a contract|a tax|money|a bank|inflation|a stock|a house|a bridge|a tower|"
    "a church|a museum|a theatre|an opera|a symphony|a poem|a novel|a painting|a statue|football|"
    "tennis|chess|swimming|skiing|a ship|a train|an aeroplane|a car|a rocket|a telescope|"
    "a microscope|a camera|a clock|a mirror|a candle|a knife|a spoon|a chair|a table|a bed|a door|"
    "a window|a garden|a flower|a rose|a tree|an oak|grass|snow|ice|rain|wind|fire|smoke|love|"
    "happiness|music|history|philosophy|biology|chemistry|medicine|a virus|a bone|the heart|"
    "the brain|blood|sleep|a dream|a language|Latin|French|grammar|a verb|a shoe|a hat".split("|")
)
# Neighbours of the course's subjects, of which it says nothing.
NEIGHBOURS = tuple(
    "quantization|LoRA|fine-tuning|reinforcement learning|RLHF|mixture of experts|beam search|"
    "speculative decoding|a diffusion model|backpropagation|gradient descent|Adam|dropout|"
    "overfitting|a convolution|an LSTM|a recurrent network|BERT|word2vec|an image model|CLIP|"
    "JAX|TensorFlow|ONNX|Kubernetes|Docker|a database|SQL|a compiler|Rust|Java|HTTP|a web server|"
    "a TPU|the internet|blockchain|an operating system|a file system|quicksort|a binary tree|"
    "a neural network|deep learning|machine learning|a robot|pipeline parallelism|"
    "expert parallelism|data parallelism|layer normalization|a vector database|RAG".split("|")
)
DIVISIONS = ("{a} divided by {b}", "{a} / {b}", "{a}/{b}", "{a} over {b}", "{a} : {b}", "{a} ÷ {b}")
HELDOUT_THINGS = ("a pear", "a guitar", "a rabbit", "a lake", "physics", "a sandwich", "a hammer")
PLACES = tuple(
    "France|Germany|Italy|Spain|Japan|China|India|Brazil|Canada|Mexico|Egypt|Kenya|Norway|Sweden|"
    "Poland|Greece|Turkey|Peru|Chile|Cuba|Iceland|Ireland|Portugal|Austria|Hungary".split("|")
)
HELDOUT_PLACES = ("Finland", "Denmark", "Vietnam", "Morocco")

ABOUT_THINGS = (
    "What is {t}?",
    "Explain {t}.",
    "Tell me about {t}.",
    "What do you know about {t}?",
    "How does {t} work?",
    "Describe {t}.",
    "Where can I buy {t}?",
    "Write a poem about {t}.",
    "Tell me a story about {t}.",
    "Tell me a joke about {t}.",
    "What colour is {t}?",
    "How old is {t}?",
    "Do you like {t}?",
    "Why do people like {t}?",
    "Who invented {t}?",
    "Draw {t}.",
    "{t}?",
)
ABOUT_PLACES = (
    "What is the capital of {t}?",
    "How many people live in {t}?",
    "What is the weather like in {t}?",
    "Where is {t}?",
    "Who rules {t}?",
    "Tell me about the history of {t}.",
    "How do I get to {t}?",
    "What language do they speak in {t}?",
    "Is {t} a nice place?",
)
ALONE = (
    "What time is it?",
    "What day is it today?",
    "What is the weather like?",
    "Tell me a joke.",
    "Sing a song.",
    "Write a poem.",
    "Write a Python program.",
    "Who won the last world cup?",
    "Translate this into French.",
    "What is the meaning of life?",
    "How old are you?",
    "Can you book a flight for me?",
    "What is the square root of 2?",
    "How do I cook an egg?",
    "What is your favourite film?",
)
HELDOUT_ABOUT_THINGS = ("Can you tell me what {t} is?", "I want to know more about {t}.")
HELDOUT_ABOUT_PLACES = ("Which city is the capital of {t}?", "Tell me about the people in {t}.")
