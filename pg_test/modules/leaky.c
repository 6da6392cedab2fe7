/*
 * A module that leaks on purpose.
 *
 * In shared_preload_libraries it leaks 80 bytes in the postmaster for each process that the postmaster starts, by a
 * fork handler. Its SQL functions allocate in contexts that outlive the transaction, in every way that rheap must
 * count: see leaky.sql.
 */
#include "postgres.h"

#include <pthread.h>
#include <unistd.h>

#include "fmgr.h"
#include "port/atomics.h"
#include "lib/stringinfo.h"
#include "miscadmin.h"
#include "utils/builtins.h"
#include "utils/memutils.h"

PG_MODULE_MAGIC;

void		_PG_init(void);

static void
leak_at_fork(void)
{
	if (getpid() == PostmasterPid)
		*(volatile char *) MemoryContextAlloc(TopMemoryContext, 80) = 42;
}

void
_PG_init(void)
{
	if (process_shared_preload_libraries_in_progress)
		pthread_atfork(leak_at_fork, NULL, NULL);
}

/* leaky_leak(count int, size int): allocates and forgets */
PG_FUNCTION_INFO_V1(leaky_leak);
Datum
leaky_leak(PG_FUNCTION_ARGS)
{
	int			count = PG_GETARG_INT32(0);

	for (int i = 0; i < count; i++)
		*(volatile char *) MemoryContextAlloc(TopMemoryContext, PG_GETARG_INT32(1)) = 42;
	PG_RETURN_VOID();
}

/* leaky_churn(count int, size int): allocates and frees at once */
PG_FUNCTION_INFO_V1(leaky_churn);
Datum
leaky_churn(PG_FUNCTION_ARGS)
{
	int			count = PG_GETARG_INT32(0);

	for (int i = 0; i < count; i++)
	{
		volatile char *chunk = MemoryContextAlloc(TopMemoryContext, PG_GETARG_INT32(1));

		*chunk = 42;
		pfree((void *) chunk);
	}
	PG_RETURN_VOID();
}

/* leaky_grow(times int, step int): one chunk that is made larger for ever; the first has one step */
PG_FUNCTION_INFO_V1(leaky_grow);
Datum
leaky_grow(PG_FUNCTION_ARGS)
{
	int			times = PG_GETARG_INT32(0);
	int			step = PG_GETARG_INT32(1);
	void	   *chunk = MemoryContextAlloc(TopMemoryContext, step);

	for (int i = 2; i <= times; i++)
		chunk = repalloc(chunk, (Size) i * step);
	PG_RETURN_VOID();
}

/* leaky_context(kind text, count int, size int, end text): chunks in a context of its own, kept, reset or deleted */
PG_FUNCTION_INFO_V1(leaky_context);
Datum
leaky_context(PG_FUNCTION_ARGS)
{
	char	   *kind = text_to_cstring(PG_GETARG_TEXT_PP(0));
	int			count = PG_GETARG_INT32(1);
	Size		size = PG_GETARG_INT32(2);
	char	   *end = text_to_cstring(PG_GETARG_TEXT_PP(3));
	MemoryContext context;

	if (strcmp(kind, "AllocSet") == 0)
		context = AllocSetContextCreate(TopMemoryContext, "leaky", ALLOCSET_DEFAULT_SIZES);
#if PG_VERSION_NUM >= 150000
	else if (strcmp(kind, "Generation") == 0)
		context = GenerationContextCreate(TopMemoryContext, "leaky", ALLOCSET_DEFAULT_SIZES);
#endif
	else if (strcmp(kind, "Slab") == 0)
		context = SlabContextCreate(TopMemoryContext, "leaky", SLAB_DEFAULT_BLOCK_SIZE, size);
#if PG_VERSION_NUM >= 170000
	else if (strcmp(kind, "Bump") == 0)
		context = BumpContextCreate(TopMemoryContext, "leaky", ALLOCSET_DEFAULT_SIZES);
#endif
	else
		elog(ERROR, "unknown kind of context \"%s\"", kind);
	for (int i = 0; i < count; i++)
		*(volatile char *) MemoryContextAlloc(context, size) = 42;
	if (strcmp(end, "reset") == 0)
		MemoryContextReset(context);
	else if (strcmp(end, "delete") == 0)
		MemoryContextDelete(context);
	PG_RETURN_VOID();
}

/* leaky_query(size int): a chunk for each call that stays until the query ends, in ExecutorState */
PG_FUNCTION_INFO_V1(leaky_query);
Datum
leaky_query(PG_FUNCTION_ARGS)
{
	*(volatile char *) MemoryContextAlloc(fcinfo->flinfo->fn_mcxt, PG_GETARG_INT32(0)) = 42;
	PG_RETURN_INT32(1);
}

/*
 * leaky_sites(first int, count int, size int): a chunk on each of count call paths, which are made of the bits of the
 * numbers from first on
 */
static MemoryContext sites = NULL;

static inline void
site_leaf(int bits, int size)
{
	*(volatile char *) MemoryContextAlloc(sites, size) = 42;
}

/*
 * Two functions for each bit, since paths that differ in recursion only are one call site. The barriers see to it that
 * there is no tail call: each function has a frame.
 */
#define LEVEL(n, below) \
	static pg_noinline void site_even_##n(int bits, int size) \
	{ \
		below(bits >> 1, size); \
		pg_compiler_barrier(); \
	} \
	static pg_noinline void site_odd_##n(int bits, int size) \
	{ \
		below(bits >> 1, size); \
		pg_compiler_barrier(); \
	} \
	static inline void site_step_##n(int bits, int size) \
	{ \
		if (bits & 1) \
			site_odd_##n(bits, size); \
		else \
			site_even_##n(bits, size); \
	}
LEVEL(1, site_leaf)
LEVEL(2, site_step_1)
LEVEL(3, site_step_2)
LEVEL(4, site_step_3)
LEVEL(5, site_step_4)
LEVEL(6, site_step_5)
LEVEL(7, site_step_6)
LEVEL(8, site_step_7)
LEVEL(9, site_step_8)
LEVEL(10, site_step_9)
LEVEL(11, site_step_10)
LEVEL(12, site_step_11)

PG_FUNCTION_INFO_V1(leaky_sites);
Datum
leaky_sites(PG_FUNCTION_ARGS)
{
	if (sites == NULL)
		sites = AllocSetContextCreate(TopMemoryContext, "leaky sites", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < PG_GETARG_INT32(1); i++)
		site_step_12(PG_GETARG_INT32(0) + i, PG_GETARG_INT32(2));
	PG_RETURN_VOID();
}

/* leaky_tree(count int): so many contexts below one, ten levels deep */
PG_FUNCTION_INFO_V1(leaky_tree);
Datum
leaky_tree(PG_FUNCTION_ARGS)
{
	MemoryContext root = AllocSetContextCreate(TopMemoryContext, "leaky tree", ALLOCSET_SMALL_SIZES);
	MemoryContext at = root;

	for (int i = 0; i < PG_GETARG_INT32(0); i++)
	{
		if (i % 10 == 0)
			at = root;
		at = AllocSetContextCreate(at, "leaky leaf", ALLOCSET_SMALL_SIZES);
	}
	PG_RETURN_VOID();
}

/* leaky_move(count int, size int): chunks in a child of TopMemoryContext, which then moves below CacheMemoryContext */
PG_FUNCTION_INFO_V1(leaky_move);
Datum
leaky_move(PG_FUNCTION_ARGS)
{
	int			count = PG_GETARG_INT32(0);
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "leaky mover", ALLOCSET_DEFAULT_SIZES);

	for (int i = 0; i < count; i++)
		*(volatile char *) MemoryContextAlloc(context, PG_GETARG_INT32(1)) = 42;
	MemoryContextSetParent(context, CacheMemoryContext);
	PG_RETURN_VOID();
}
