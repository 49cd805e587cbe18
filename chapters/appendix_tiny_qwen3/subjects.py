"""The course's subjects: what Tiny Qwen3 knows, in the sentences it is to say.

Every entry is one subject: the names a reader may call it by (with their article, where they
take one) and the one reference answer. The answers are the only text about the course that the
model ever sees, so whatever is wrong here will be wrong in the model.
"""

from typing import NamedTuple


class Subject(NamedTuple):
    """One subject of the course.

    names: what it is called, the usual name first; an article belongs to the name.
    answer: the reference answer, one to three sentences.
    """

    names: tuple[str, ...]
    answer: str


SUBJECTS: tuple[Subject, ...] = (
    # Chapter 1: layers
    Subject(
        ("a token", "tokens"),
        "A token is the unit of text that a language model reads and writes: a word, a piece of "
        "a word or a single byte. Inside the engine it is just a number.",
    ),
    Subject(
        ("a tokenizer", "the tokenizer", "tokenization"),
        "A tokenizer turns text into token ids and token ids back into text. It must be the very "
        "one that the model was trained with, since the ids mean nothing on their own.",
    ),
    Subject(
        ("byte-pair encoding", "BPE", "byte pair encoding"),
        "Byte-pair encoding builds a vocabulary by merging the most frequent pair of neighbouring "
        "symbols again and again. Starting from bytes, it can spell any text at all.",
    ),
    Subject(
        ("a vocabulary", "the vocabulary", "the vocabulary size"),
        "The vocabulary is the set of all tokens that a model knows. Its size is the number of "
        "rows in the embedding table and the number of logits for each position.",
    ),
    Subject(
        ("an embedding", "the embedding layer", "token embeddings", "the embedding table"),
        "The embedding layer is a table with one vector for each token of the vocabulary. Looking "
        "up a token id gives the hidden state with which the first layer starts.",
    ),
    Subject(
        ("the LM head", "a language model head", "an LM head"),
        "The LM head is the last linear layer. It turns the hidden state of a position into one "
        "logit for each token of the vocabulary.",
    ),
    Subject(
        ("tied embeddings", "weight tying", "tied weights"),
        "With tied embeddings the LM head uses the same matrix as the embedding table. That saves "
        "memory, above all in small models.",
    ),
    Subject(
        ("logits", "a logit"),
        "Logits are the raw scores that a model gives to every token of the vocabulary. A softmax "
        "over them yields the probabilities of the next token.",
    ),
    Subject(
        ("softmax", "the softmax", "the softmax function"),
        "Softmax turns scores into probabilities: it exponentiates each score and divides by the "
        "sum. The maximum is subtracted first so that nothing overflows.",
    ),
    Subject(
        ("RMSNorm", "root mean square normalization", "an RMSNorm layer", "RMS norm"),
        "RMSNorm divides a vector by the root of its mean square and multiplies it by a learned "
        "weight. It is cheaper than LayerNorm, because it subtracts no mean and adds no bias.",
    ),
    Subject(
        ("SiLU", "the SiLU activation", "the SiLU function"),
        "SiLU multiplies its input by the sigmoid of that input. It is the smooth activation "
        "function inside the MLP of Qwen3.",
    ),
    Subject(
        ("SwiGLU", "a SwiGLU layer", "a gated MLP"),
        "SwiGLU is an MLP with a gate: one projection goes through SiLU, is multiplied with a "
        "second projection, and a third one maps the product back to the hidden size.",
    ),
    Subject(
        ("the MLP", "an MLP", "the feed-forward layer", "a feed-forward network"),
        "The MLP is the part of a decoder layer that works on each token alone. It widens the "
        "hidden state, applies a non-linear function and narrows it again.",
    ),
    Subject(
        ("a residual connection", "the residual stream", "residual connections"),
        "A residual connection adds the input of a block to its output. So each layer only has to "
        "learn a correction, and gradients can pass through deep models.",
    ),
    Subject(
        ("RoPE", "rotary embeddings", "rotary position embedding", "a rotary embedding"),
        "RoPE tells attention where a token stands: it rotates pairs of components of queries and "
        "keys by an angle that grows with the position. The dot product then depends only on the "
        "distance between two tokens.",
    ),
    Subject(
        ("a fused linear layer", "a fused QKV projection", "the fused QKV layer"),
        "A fused linear layer joins several projections of the same input, such as query, key and "
        "value, into one matrix. One large matrix product is faster than three small ones.",
    ),
    Subject(
        ("QK norm", "query and key normalization", "QK-norm"),
        "QK norm applies an RMSNorm to every query head and key head before the rotation. Qwen3 "
        "does so to keep the attention scores in a healthy range.",
    ),
    Subject(
        ("a decoder layer", "a transformer block", "a transformer layer"),
        "A decoder layer is attention followed by an MLP, each behind a norm and with a residual "
        "connection around it. A model is a stack of such layers.",
    ),
    Subject(
        ("the hidden size", "the hidden state", "hidden states"),
        "The hidden state is the vector that represents a token between two layers. Its length is "
        "the hidden size of the model.",
    ),
    # Chapter 2: the model
    Subject(
        ("Qwen3", "the Qwen3 architecture", "the Qwen3 model"),
        "Qwen3 is a family of open language models. Its dense models are decoders with "
        "grouped-query attention, QK norm, RoPE, RMSNorm and SwiGLU.",
    ),
    Subject(
        ("safetensors", "a safetensors file", "the safetensors format"),
        "Safetensors is a file format for weights: a short header that names every tensor, then "
        "the raw bytes. It can be read piece by piece and runs no code when it is loaded.",
    ),
    Subject(
        ("a checkpoint", "model weights", "a model checkpoint"),
        "A checkpoint is a folder that holds a trained model: its weights, its configuration and "
        "its tokenizer.",
    ),
    Subject(
        ("bfloat16", "bf16", "the bfloat16 format"),
        "Bfloat16 is a floating-point format of 16 bits with the range of float32 but only eight "
        "bits of precision. It halves the memory traffic and runs on tensor cores.",
    ),
    Subject(
        ("a chat template", "the chat template", "chat templates"),
        "A chat template writes a list of messages as one text, with markers that show who is "
        "speaking. The model was trained on exactly these markers.",
    ),
    Subject(
        ("a system prompt", "the system prompt", "system prompts"),
        "A system prompt is the first message of a chat and tells the model how to behave. "
        "Requests often share it, so prefix caching can compute it just once.",
    ),
    # Sampling
    Subject(
        ("the sampler", "a sampler", "sampling"),
        "The sampler picks the next token from the logits. It applies temperature and filters "
        "such as top-k and top-p, and then draws from what is left.",
    ),
    Subject(
        ("temperature", "the temperature", "the sampling temperature"),
        "The temperature divides the logits before the softmax. A low temperature makes the "
        "choice almost certain, a high one makes it more random, and zero means greedy.",
    ),
    Subject(
        ("top-p", "top-p sampling", "nucleus sampling", "top p"),
        "Top-p keeps the smallest set of most likely tokens whose probabilities sum to at least p "
        "and drops the rest.",
    ),
    Subject(
        ("top-k", "top-k sampling", "top k"),
        "Top-k keeps only the k most likely tokens and drops all others before the draw.",
    ),
    Subject(
        ("min-p", "min-p sampling", "min p"),
        "Min-p drops every token whose probability is less than a given fraction of that of the "
        "most likely token.",
    ),
    Subject(
        ("greedy decoding", "greedy sampling", "greedy search"),
        "Greedy decoding always takes the token with the largest logit. It is deterministic, "
        "which makes it the right choice for tests.",
    ),
    Subject(
        ("the Gumbel-max trick", "Gumbel-max sampling", "Gumbel noise"),
        "The Gumbel-max trick adds Gumbel noise to the logits and takes the maximum. That is an "
        "exact draw from the softmax, done in one pass without computing any sum.",
    ),
    Subject(
        ("a stop token", "the EOS token", "an end-of-sequence token", "stop tokens"),
        "A stop token ends a completion: when the model produces it, the request is finished and "
        "its memory is given back.",
    ),
    Subject(
        ("sampling parameters", "SamplingParams"),
        "Sampling parameters say how one request is to be sampled: temperature, top-k, top-p, the "
        "seed, the stop conditions and the largest number of new tokens.",
    ),
    # Chapter 3: attention
    Subject(
        ("attention", "self-attention", "the attention mechanism", "scaled dot-product attention"),
        "Attention lets a token gather information from other tokens. Its query is compared with "
        "every key, a softmax turns the scores into weights, and the output is the weighted sum "
        "of the values.",
    ),
    Subject(
        ("multi-head attention", "MHA", "an attention head", "attention heads"),
        "Multi-head attention runs several attentions side by side, each on its own slice of the "
        "hidden state. Every head can look for something different.",
    ),
    Subject(
        ("grouped-query attention", "GQA", "grouped query attention"),
        "In grouped-query attention several query heads share one head of keys and values. The KV "
        "cache shrinks by that factor, with hardly any loss of quality.",
    ),
    Subject(
        ("multi-query attention", "MQA", "multi query attention"),
        "Multi-query attention is the extreme case of sharing: all query heads use one single "
        "head of keys and values.",
    ),
    Subject(
        ("the causal mask", "a causal mask", "causal attention"),
        "The causal mask forbids a token to look at later tokens, by setting those scores to minus "
        "infinity. That is why earlier keys and values never change and can be cached.",
    ),
    Subject(
        (
            "the KV cache",
            "a KV cache",
            "the key-value cache",
            "KV caching",
            "caching keys and values",
        ),
        "The KV cache stores the keys and values of all tokens seen so far. Thanks to it, each "
        "new token costs one step instead of a pass over the whole text.",
    ),
    Subject(
        ("prefill", "the prefill phase", "prefilling"),
        "Prefill is the first phase of a request: all tokens of the prompt go through the model "
        "at once and fill the KV cache. It is bound by computation.",
    ),
    Subject(
        ("decode", "the decode phase", "decoding", "a decode step"),
        "Decode is the second phase of a request: the model produces one token at each step and "
        "reads the whole KV cache to do so. It is bound by memory bandwidth.",
    ),
    Subject(
        (
            "the difference between prefill and decode",
            "prefill versus decode",
            "prefill and decode",
            "prefill compared with decode",
            "prefill vs decode",
        ),
        "Prefill handles many prompt tokens in one pass and is limited by computation. Decode "
        "handles one token of each sequence in a step and is limited by memory bandwidth.",
    ),
    # Chapter 4: flash attention, kernels
    Subject(
        ("flash attention", "FlashAttention", "the flash attention algorithm", "flash-attention"),
        "Flash attention computes exact attention tile by tile in fast on-chip memory. The full "
        "matrix of scores is never written out, so memory grows only linearly with the length.",
    ),
    Subject(
        ("online softmax", "the online softmax", "streaming softmax"),
        "Online softmax computes a softmax in one pass over the scores. It keeps a running maximum "
        "and a running sum, and rescales what it has gathered whenever the maximum rises.",
    ),
    Subject(
        ("a tile", "tiling", "tiles"),
        "A tile is a small block of a matrix that fits into on-chip memory. Working tile by tile "
        "means that each value is loaded once and used many times.",
    ),
    Subject(
        ("Triton", "the Triton language", "OpenAI Triton"),
        "Triton is a language for GPU kernels written inside Python. You say what one program does "
        "with its blocks of data, and the compiler takes care of threads and shared memory.",
    ),
    Subject(
        ("a Triton program", "the program id", "a program instance"),
        "A Triton program is one instance of a kernel. Its program id tells it which block of the "
        "output it has to compute.",
    ),
    Subject(
        ("a GPU kernel", "a kernel", "GPU kernels"),
        "A GPU kernel is a function that the GPU runs in many parallel copies. Each launch of one "
        "costs the CPU a few microseconds.",
    ),
    Subject(
        ("kernel fusion", "a fused kernel", "fusing kernels"),
        "Kernel fusion joins several operations into one kernel. What lies between them stays in "
        "registers, so it need not travel to memory and back.",
    ),
    Subject(
        ("autotuning", "an autotuner", "kernel autotuning"),
        "Autotuning runs a kernel with several tile sizes and numbers of warps, times them all and "
        "keeps the fastest one.",
    ),
    Subject(
        ("a warp", "warps"),
        "A warp is a group of 32 threads that run in step on a GPU. A Triton program is carried "
        "out by one or more warps.",
    ),
    Subject(
        ("shared memory", "on-chip memory", "SRAM"),
        "Shared memory is a small and very fast memory inside each multiprocessor of a GPU. A "
        "kernel keeps the tiles there that it uses again and again.",
    ),
    Subject(
        ("HBM", "high-bandwidth memory", "GPU memory", "global memory"),
        "HBM is the large main memory of a GPU. It holds the weights and the KV cache, and reading "
        "it is what a decode step spends most of its time on.",
    ),
    Subject(
        ("tensor cores", "a tensor core"),
        "Tensor cores are the units of a GPU that multiply small matrices in a single instruction. "
        "Most of the computing power of a modern GPU sits in them.",
    ),
    Subject(
        ("arithmetic intensity", "the arithmetic intensity"),
        "Arithmetic intensity is the number of operations done for each byte moved from memory. It "
        "decides whether a kernel is limited by computation or by bandwidth.",
    ),
    Subject(
        ("the roofline model", "a roofline", "the roofline"),
        "The roofline model bounds the speed of a kernel by two limits: the peak rate of the "
        "machine, and its bandwidth times the arithmetic intensity.",
    ),
    Subject(
        ("memory bandwidth", "the memory bandwidth"),
        "Memory bandwidth is the number of bytes that can be moved from memory in a second. It "
        "sets the speed limit of decode.",
    ),
    Subject(
        ("memory-bound", "a memory-bound kernel", "being memory-bound", "memory-bound work"),
        "A kernel is memory-bound when it waits for data most of the time. Then it only gets "
        "faster by moving fewer bytes.",
    ),
    Subject(
        ("compute-bound", "a compute-bound kernel", "being compute-bound"),
        "A kernel is compute-bound when its arithmetic units are busy all the time. Then it only "
        "gets faster by doing less arithmetic or by using faster units.",
    ),
    # Chapter 5: paged attention
    Subject(
        ("paged attention", "PagedAttention", "the paged attention algorithm"),
        "Paged attention keeps the KV cache in blocks of fixed size that may lie anywhere in "
        "memory. The kernel finds them through the block table of each sequence, so hardly any "
        "memory is wasted.",
    ),
    Subject(
        ("a block table", "the block table", "block tables"),
        "A block table lists the KV blocks of one sequence in order. It translates the position of "
        "a token into the block that holds its keys and values, just as a page table does with "
        "addresses.",
    ),
    Subject(
        ("slot mapping", "the slot mapping", "a slot mapping"),
        "The slot mapping says for each token of a batch where its key and value are written. A "
        "slot is the block number times the block size plus the place within the block.",
    ),
    Subject(
        ("a KV block", "KV blocks", "a block of the KV cache", "a KV page"),
        "A KV block is a piece of the KV cache that holds the keys and values of a fixed number of "
        "tokens. It is the unit in which cache memory is given out and taken back.",
    ),
    Subject(
        ("the block size", "block size"),
        "The block size is the number of tokens in one KV block. Small blocks waste less memory, "
        "large ones need fewer look-ups.",
    ),
    Subject(
        ("fragmentation", "memory fragmentation", "internal fragmentation"),
        "Fragmentation is memory that is reserved or free but cannot be used. With blocks of fixed "
        "size only the last block of a sequence can be partly empty.",
    ),
    Subject(
        ("split-KV decoding", "flash decoding", "split KV", "split-K attention"),
        "Flash decoding cuts a long context into parts that run in parallel, and then merges the "
        "partial results with their maxima and sums. It keeps a GPU busy even with few sequences.",
    ),
    # Chapter 6: block manager
    Subject(
        ("the block manager", "a block manager", "the KV block manager"),
        "The block manager hands out KV blocks to sequences, shares them between equal prefixes "
        "and takes them back. It counts references, and it needs no GPU to do so.",
    ),
    Subject(
        (
            "prefix caching",
            "the prefix cache",
            "automatic prefix caching",
            "sharing prefixes",
            "prefix sharing",
            "shared prefixes",
        ),
        "Prefix caching keeps the KV blocks of earlier prompts and reuses them for a new prompt "
        "that begins with the same tokens. The shared part then costs no computation.",
    ),
    Subject(
        (
            "a reference count",
            "reference counting",
            "the reference count",
            "the ref count",
            "ref counts",
        ),
        "A reference count tells how many sequences use a block at the moment. When it drops to "
        "zero, the block may be used for something else.",
    ),
    Subject(
        ("a hash chain", "chained hashing", "the hash chain", "the block hash"),
        "In a hash chain the hash of a block covers its own tokens and the hash of the block in "
        "front of it. So equal hashes mean that the whole prefix is equal, not just one block.",
    ),
    Subject(
        (
            "LRU eviction",
            "the LRU policy",
            "least-recently-used eviction",
            "eviction",
            "evicted blocks",
        ),
        "LRU eviction gives up the cached block that has been unused for the longest time. Only "
        "blocks that no sequence holds can be evicted.",
    ),
    Subject(
        ("the free list", "a free list", "the free block queue"),
        "The free list holds the blocks that no sequence uses. A new block is taken from its front "
        "and a block that is released goes to its back.",
    ),
    Subject(
        ("the cache hit rate", "the prefix cache hit rate", "the hit rate"),
        "The cache hit rate is the share of prompt tokens whose keys and values were found in the "
        "prefix cache and need not be computed again.",
    ),
    Subject(
        ("a sequence", "the sequence object"),
        "A sequence is one request on its way through the engine: its tokens, its block table, its "
        "state and how many of its tokens are computed.",
    ),
    # Chapter 7: scheduler and engine
    Subject(
        ("the scheduler", "a scheduler", "scheduling"),
        "The scheduler decides at every step which sequences run and with how many tokens. It has "
        "to keep within the token budget and the free KV blocks.",
    ),
    Subject(
        ("continuous batching", "iteration-level scheduling", "in-flight batching"),
        "Continuous batching chooses the batch anew at every step. A finished request leaves at "
        "once and a waiting one takes its place, so the GPU never idles for the slowest.",
    ),
    Subject(
        ("static batching", "a static batch"),
        "Static batching runs a fixed group of requests until the last of them is done. The short "
        "ones wait for the longest one, and the GPU is half empty meanwhile.",
    ),
    Subject(
        ("chunked prefill", "prefill chunks", "chunking a prompt"),
        "Chunked prefill cuts a long prompt into pieces that are computed over several steps. So "
        "the requests that are decoding do not have to wait for one huge prompt.",
    ),
    Subject(
        (
            "preemption",
            "preempting a request",
            "preemption by recompute",
            "preempted requests",
            "being preempted",
        ),
        "Preemption takes the KV blocks away from a running request when memory runs out, newest "
        "request first. That request goes back to the queue and is computed again later.",
    ),
    Subject(
        ("the token budget", "a token budget", "max_num_batched_tokens"),
        "The token budget is the largest number of tokens that one step may process. It bounds how "
        "long a step takes and how much memory it needs.",
    ),
    Subject(
        ("the waiting queue", "a waiting queue", "the request queue"),
        "The waiting queue holds the requests that have not started yet or were preempted. The "
        "scheduler admits them in order as soon as there is room.",
    ),
    Subject(
        ("the model runner", "a model runner"),
        "The model runner turns the scheduler's choice into tensors, runs the model and samples "
        "the next tokens. It is the only part of the engine that talks to the GPU.",
    ),
    Subject(
        ("the LLM engine", "an inference engine", "LLMEngine"),
        "The LLM engine ties the parts together: it takes in requests, asks the scheduler for a "
        "batch, lets the model runner compute it and hands out the new tokens.",
    ),
    Subject(
        ("a batch", "batching", "the batch size"),
        "A batch is a group of sequences that go through the model together. The weights are then "
        "read from memory once for all of them.",
    ),
    Subject(
        ("padding", "padding tokens"),
        "Padding fills short sequences with empty tokens until all have the same length. It wastes "
        "work, so an engine rather flattens the batch into one long row.",
    ),
    Subject(
        ("TTFT", "time to first token", "the time to first token"),
        "TTFT is the time to first token: how long a user waits from sending a request until the "
        "first token arrives. Queueing and prefill decide it.",
    ),
    Subject(
        ("inter-token latency", "TPOT", "time per output token", "ITL"),
        "Inter-token latency is the time between two tokens of the same answer. It is about the "
        "length of one decode step.",
    ),
    Subject(
        ("throughput", "the throughput"),
        "Throughput is the number of tokens that the engine produces in a second for all requests "
        "together. Larger batches raise it, but each single request may become slower.",
    ),
    Subject(
        ("incremental detokenization", "streaming text", "detokenization"),
        "Incremental detokenization turns tokens into text while they arrive. It holds back bytes "
        "until they form a whole character.",
    ),
    Subject(
        ("max_model_len", "the maximum model length", "the context length"),
        "The maximum model length is the largest number of tokens that a request may have, prompt "
        "and answer together.",
    ),
    # Chapter 8: CUDA graphs
    Subject(
        ("a CUDA graph", "CUDA graphs", "CUDA graph capture", "graph capture"),
        "A CUDA graph records a sequence of kernel launches once and replays it with a single "
        "call. It frees decode from the launch overhead of the CPU.",
    ),
    Subject(
        ("launch overhead", "kernel launch overhead", "the launch overhead"),
        "Launch overhead is the time that the CPU needs to start a kernel. With small batches it "
        "can be longer than the kernel itself.",
    ),
    Subject(
        ("eager mode", "enforce_eager", "eager execution"),
        "In eager mode every operation is launched as Python reaches it, without a CUDA graph. It "
        "is slower for decode but easy to debug.",
    ),
    Subject(
        ("warm-up", "warming up", "a warm-up run"),
        "A warm-up runs the model a few times before anything is measured or captured. Kernels are "
        "compiled, memory is reserved and caches are filled in that time.",
    ),
    # Chapter 9: tensor parallelism
    Subject(
        (
            "tensor parallelism",
            "TP",
            "tensor parallel inference",
            "running a model on several GPUs",
            "splitting a model over GPUs",
        ),
        "Tensor parallelism splits the matrices of every layer over several GPUs. Each one "
        "computes its share, and an all-reduce adds up the partial results.",
    ),
    Subject(
        ("all-reduce", "an all-reduce", "the all-reduce operation"),
        "An all-reduce adds up a tensor over all ranks and gives the sum to every one of them. A "
        "tensor-parallel decoder layer needs two: after attention and after the MLP.",
    ),
    Subject(
        ("a column-parallel linear layer", "column parallelism", "a column-parallel layer"),
        "A column-parallel layer splits the output features of a matrix over the ranks. Every rank "
        "reads the whole input and yields a part of the output, without any communication.",
    ),
    Subject(
        ("a row-parallel linear layer", "row parallelism", "a row-parallel layer"),
        "A row-parallel layer splits the input features of a matrix over the ranks. Every rank "
        "yields a partial sum of the whole output, and an all-reduce adds them up.",
    ),
    Subject(
        ("NCCL", "the NCCL library"),
        "NCCL is NVIDIA's library for communication between GPUs. It provides all-reduce, gather, "
        "broadcast and other collective operations.",
    ),
    Subject(
        ("a rank", "the rank", "the tensor parallel rank"),
        "A rank is the number of a process in a parallel group, counted from zero. It tells the "
        "process which shard of the weights is its own.",
    ),
    Subject(
        ("the world size", "world size"),
        "The world size is the number of processes in a parallel group. With tensor parallelism it "
        "is the number of GPUs that share one model.",
    ),
    # The course itself
    Subject(
        ("minivllm", "this course", "the minivllm project"),
        "Minivllm is a course in which you build a fast inference engine for language models, "
        "chapter by chapter. What you have at the end is small, readable and complete.",
    ),
    Subject(
        ("vLLM", "the vLLM project"),
        "The project vLLM is a widely used open inference engine for language models. It made "
        "paged attention known, and minivllm follows its ideas and its interface.",
    ),
)
