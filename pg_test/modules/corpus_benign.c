/*
 * Code that only looks like a leak: see corpus.h.
 */
#include "corpus.h"

PG_MODULE_MAGIC;

/* Filled by keys that come at random until all are known: a cache that saturates. */
SCENARIO(saturates)
{
	static void *entries[2000];

	for (int i = 0; i < 100; i++)
	{
		void	  **entry = &entries[next_random() % lengthof(entries)];

		if (*entry == NULL)
			*entry = TAKE(TopMemoryContext, 400);
	}
	PG_RETURN_INT64(0);
}

/* Full at once; then each new entry takes the place of a random one. */
SCENARIO(lru)
{
	static void *entries[1000];

	for (int i = 0; i < 60; i++)
	{
		void	  **entry = &entries[next_random() % lengthof(entries)];

		if (*entry != NULL)
			pfree(*entry);
		*entry = TAKE(TopMemoryContext, 500);
	}
	PG_RETURN_INT64(0);
}

/* Collects, and gives all back from time to time. */
SCENARIO(sawtooth)
{
	static void *chunks[400];
	static int	used = 0;

	for (int i = 0; i < 20; i++)
	{
		if (used == lengthof(chunks))
			while (used > 0)
				pfree(chunks[--used]);
		chunks[used++] = TAKE(TopMemoryContext, 2000);
	}
	PG_RETURN_INT64(0);
}

/* An arena that every hundredth unit of work resets. */
SCENARIO(arena)
{
	static MemoryContext arena = NULL;
	static int	calls = 0;

	if (arena == NULL)
		arena = AllocSetContextCreate(TopMemoryContext, "corpus arena", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < 10; i++)
	{
		if (++calls % 100 == 0)
			MemoryContextReset(arena);
		TAKE(arena, 8000);
	}
	PG_RETURN_INT64(0);
}

/* Made at the first call, used ever after. */
SCENARIO(once)
{
	static void *table = NULL;

	if (table == NULL)
	{
		table = TAKE(TopMemoryContext, 2000000);
		for (int i = 0; i < 900; i++)
			TAKE(TopMemoryContext, 1000);
	}
	PG_RETURN_INT64(0);
}

/* A ring buffer: the oldest makes room for the newest. */
SCENARIO(ring)
{
	static void *ring[512];
	static int	next = 0;

	for (int i = 0; i < 20; i++)
	{
		if (ring[next] != NULL)
			pfree(ring[next]);
		ring[next] = TAKE(TopMemoryContext, 1000 + next_random() % 1000);
		next = (next + 1) % lengthof(ring);
	}
	PG_RETURN_INT64(0);
}

/* A small one, with one new entry at a time. */
SCENARIO(round)
{
	static void *ring[48];
	static int	next = 0;

	if (ring[next] != NULL)
		pfree(ring[next]);
	ring[next] = TAKE(TopMemoryContext, 3000);
	next = (next + 1) % lengthof(ring);
	PG_RETURN_INT64(0);
}

/* Frees what the call before has allocated. */
SCENARIO(behind)
{
	static void *last = NULL;

	if (last != NULL)
		pfree(last);
	last = TAKE(TopMemoryContext, 500000);
	PG_RETURN_INT64(0);
}

/* A buffer that grows to the largest message, and stays. */
SCENARIO(buffer)
{
	static void *buffer = NULL;
	static Size size = 1024;
	Size		wanted = 1024 + next_random() % 500000;

	if (buffer == NULL)
		buffer = TAKE(TopMemoryContext, size);
	while (size < wanted)
		buffer = touched(repalloc(buffer, size *= 2));
	PG_RETURN_INT64(0);
}
