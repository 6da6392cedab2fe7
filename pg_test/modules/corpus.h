/*
 * What the modules of the corpus have in common: scenarios that verdicts are measured on, see ../corpus.py.
 *
 * Each SQL function does one unit of work and returns how many bytes of it are never given back. What leaks is
 * allocated in a function of the same name with `_site` at its end.
 */
#ifndef CORPUS_H
#define CORPUS_H

#include "postgres.h"

#include "fmgr.h"
#include "port/atomics.h"
#include "utils/memutils.h"

/* Allocates, and touches what it got, so that no compiler leaves the call out. */
#define TAKE(context, size) touched(MemoryContextAlloc((context), (size)))
#define KEEPS_FRAME() pg_compiler_barrier()

static inline void *
touched(void *chunk)
{
	*(volatile char *) chunk = 42;
	return chunk;
}

#define SCENARIO(name) \
	PG_FUNCTION_INFO_V1(corpus_##name); \
	Datum corpus_##name(PG_FUNCTION_ARGS)

/* A place that allocates size bytes in a context. */
#define SITE(name) \
	static pg_noinline void *name##_site(MemoryContext context, Size size) \
	{ \
		void	   *chunk = TAKE(context, size); \
		KEEPS_FRAME(); \
		return chunk; \
	}

static inline uint32
next_random(void)
{
	static uint64 state = 0x9E3779B97F4A7C15;

	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32) (state >> 32);
}

#endif							/* CORPUS_H */
