"""Real prompts of several kinds, for models with real weights."""

SMOLLM2_PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue to a child.",
    "List three uses of a paper clip.",
    "def fibonacci(n):\n    ",
    "Translate to German: The weather is nice today.",
    "Who wrote Romeo and Juliet, and when?",
    "Summarise the water cycle in two sentences.",
    "12 * 13 =",
    "Give me a recipe for pancakes.",
    "What happens when ice melts?",
    "Once upon a time, in a village by a river,",
    "Name the planets of the solar system in order.",
    "How do vaccines work?",
    "Schreibe einen Satz über den Herbst.",
    "今天天气怎么样?",
    "The quick brown fox",
    "Write an SQL query that counts users by country.",
    "What is the difference between a list and a tuple in Python?",
    "Tell me a joke about computers. 😀",
)
