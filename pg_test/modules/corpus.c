/*
 * Code that leaks in the session that runs it: see corpus.h.
 */
#include "corpus.h"

#include "nodes/pg_list.h"
#include "utils/hsearch.h"

PG_MODULE_MAGIC;

SITE(small)
SCENARIO(small)
{
	for (int i = 0; i < 20; i++)
		small_site(TopMemoryContext, 120);
	PG_RETURN_INT64(20 * 120);
}

SITE(rare)
SCENARIO(rare)
{
	for (int i = 0; i < 500; i++)
	{
		void	   *chunk = rare_site(TopMemoryContext, 240);

		if (i % 50 != 0)
			pfree(chunk);
	}
	PG_RETURN_INT64(10 * 240);
}

SITE(large)
SCENARIO(large)
{
	large_site(TopMemoryContext, 20000);
	PG_RETURN_INT64(20000);
}

SITE(variable)
SCENARIO(variable)
{
	int64		bytes = 0;

	for (int i = 0; i < 10; i++)
	{
		Size		size = 8 + next_random() % 1000;

		variable_site(TopMemoryContext, size);
		bytes += size;
	}
	PG_RETURN_INT64(bytes);
}

SITE(cache)
SCENARIO(cache)
{
	for (int i = 0; i < 20; i++)
		cache_site(CacheMemoryContext, 200);
	PG_RETURN_INT64(20 * 200);
}

SITE(child)
SCENARIO(child)
{
	static MemoryContext child = NULL;

	if (child == NULL)
		child = AllocSetContextCreate(CacheMemoryContext, "corpus child", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < 30; i++)
		child_site(child, 100);
	PG_RETURN_INT64(30 * 100);
}

/* A context for each call that nobody deletes. */
static pg_noinline void
contexts_site(int size)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "corpus session", ALLOCSET_SMALL_SIZES);

	TAKE(context, size);
	TAKE(context, 2 * size);
	KEEPS_FRAME();
}

SCENARIO(contexts)
{
	for (int i = 0; i < 5; i++)
		contexts_site(200);
	PG_RETURN_INT64(5 * 600);
}

/* Built where it would go away with the query, then given to a parent that stays. */
static pg_noinline void
reparented_site(int size)
{
	MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "corpus plan", ALLOCSET_SMALL_SIZES);

	TAKE(context, size);
	TAKE(context, size);
	MemoryContextSetParent(context, CacheMemoryContext);
	KEEPS_FRAME();
}

SCENARIO(reparented)
{
	for (int i = 0; i < 5; i++)
		reparented_site(300);
	PG_RETURN_INT64(5 * 600);
}

/* A hash table that only gets keys. Its bytes are the server's business: only that it grows is known. */
static pg_noinline void
hash_site(HTAB *table, int *key)
{
	hash_search(table, key, HASH_ENTER, NULL);
	KEEPS_FRAME();
}

SCENARIO(hash)
{
	static HTAB *table = NULL;
	static int	key = 0;

	if (table == NULL)
	{
		HASHCTL		control = {.keysize = sizeof(int), .entrysize = 128, .hcxt = TopMemoryContext};

		table = hash_create("corpus keys", 64, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
	}
	for (int i = 0; i < 20; i++, key++)
		hash_site(table, &key);
	PG_RETURN_NULL();
}

static pg_noinline void *
array_site(void *array, Size size)
{
	array = array ? repalloc(array, size) : MemoryContextAlloc(TopMemoryContext, size);
	KEEPS_FRAME();
	return touched(array);
}

SCENARIO(array)
{
	static void *array = NULL;
	static Size size = 0;

	size += 3000;
	array = array_site(array, size);
	PG_RETURN_INT64(3000);
}

static pg_noinline List *
list_site(List *list)
{
	MemoryContext before = MemoryContextSwitchTo(TopMemoryContext);

	list = lappend(list, psprintf("%0120d", 42));
	MemoryContextSwitchTo(before);
	KEEPS_FRAME();
	return list;
}

SCENARIO(list)
{
	static List *list = NIL;

	for (int i = 0; i < 20; i++)
		list = list_site(list);
	PG_RETURN_NULL();
}

SITE(generation)
SCENARIO(generation)
{
	static MemoryContext context = NULL;

	if (context == NULL)
		context = GenerationContextCreate(TopMemoryContext, "corpus generation", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < 10; i++)
		generation_site(context, 300);
	PG_RETURN_INT64(10 * 300);
}

SITE(slab)
SCENARIO(slab)
{
	static MemoryContext context = NULL;

	if (context == NULL)
		context = SlabContextCreate(TopMemoryContext, "corpus slab", SLAB_DEFAULT_BLOCK_SIZE, 160);
	for (int i = 0; i < 20; i++)
		slab_site(context, 160);
	PG_RETURN_INT64(20 * 160);
}

#if PG_VERSION_NUM >= 170000
SITE(bump)
SCENARIO(bump)
{
	static MemoryContext context = NULL;

	if (context == NULL)
		context = BumpContextCreate(TopMemoryContext, "corpus bump", ALLOCSET_DEFAULT_SIZES);
	for (int i = 0; i < 20; i++)
		bump_site(context, 160);
	PG_RETURN_INT64(20 * 160);
}
#endif

/* Two leaks in one context, nine to one. */
SITE(nine)
SITE(one)
SCENARIO(nine)
{
	for (int i = 0; i < 36; i++)
		nine_site(TopMemoryContext, 250);
	for (int i = 0; i < 4; i++)
		one_site(TopMemoryContext, 250);
	PG_RETURN_INT64(36 * 250);
}

/* One leak that two ways lead to. */
SITE(shared)
static pg_noinline void
first_way(void)
{
	shared_site(TopMemoryContext, 100);
	KEEPS_FRAME();
}

static pg_noinline void
second_way(void)
{
	shared_site(TopMemoryContext, 100);
	KEEPS_FRAME();
}

SCENARIO(shared)
{
	for (int i = 0; i < 15; i++)
	{
		first_way();
		second_way();
	}
	PG_RETURN_INT64(30 * 100);
}

/* Sixteen depths of recursion: one leak. */
static pg_noinline void
recursion_site(int depth)
{
	if (depth == 0)
		TAKE(TopMemoryContext, 200);
	else
		recursion_site(depth - 1);
	KEEPS_FRAME();
}

SCENARIO(recursion)
{
	for (int i = 0; i < 16; i++)
		recursion_site(i);
	PG_RETURN_INT64(16 * 200);
}

/* Freed in the end, unless there is an error on the way. */
SITE(error)
SCENARIO(error)
{
	bool		fails = PG_GETARG_INT32(0) % 2 == 0;

	for (int i = 0; i < 10; i++)
	{
		void	   *chunk = error_site(TopMemoryContext, 500);

		if (fails && i == 9)
		{
			for (int leaked = 0; leaked < 7; leaked++)
				error_site(TopMemoryContext, 500);
			ereport(ERROR, errmsg("on the way"));
		}
		pfree(chunk);
	}
	PG_RETURN_INT64(0);
}

/* Frees what it allocates for a long time, and then no more. */
SITE(late)
SCENARIO(late)
{
	static int	calls = 0;

	calls++;
	for (int i = 0; i < 40; i++)
	{
		void	   *chunk = late_site(TopMemoryContext, 200);

		if (calls <= 40)
			pfree(chunk);
	}
	PG_RETURN_INT64(calls <= 40 ? 0 : 40 * 200);
}

/* Arrays that grow in turn, where the server has its caches. */
static pg_noinline void *
arrays_site(void *array, Size size)
{
	array = array ? repalloc(array, size) : MemoryContextAlloc(CacheMemoryContext, size);
	KEEPS_FRAME();
	return touched(array);
}

SCENARIO(arrays)
{
	static void *arrays[3];
	static Size size = 0;

	size += 1000;
	for (int i = 0; i < 3; i++)
		arrays[i] = arrays_site(arrays[i], size);
	PG_RETURN_INT64(3 * 1000);
}

/* A list of numbers: one chunk, which doubles ever more seldom. */
static pg_noinline List *
numbers_site(List *list, int number)
{
	MemoryContext before = MemoryContextSwitchTo(TopMemoryContext);

	list = lappend_int(list, number);
	MemoryContextSwitchTo(before);
	KEEPS_FRAME();
	return list;
}

SCENARIO(numbers)
{
	static List *list = NIL;

	for (int i = 0; i < 1000; i++)
		list = numbers_site(list, i);
	PG_RETURN_NULL();
}

/* One leak that eight ways lead to, none of which is much. */
SITE(ways)
#define WAY(n) \
	static pg_noinline void way_##n(void) \
	{ \
		ways_site(TopMemoryContext, 100); \
		KEEPS_FRAME(); \
	}
WAY(0) WAY(1) WAY(2) WAY(3) WAY(4) WAY(5) WAY(6) WAY(7)
SCENARIO(ways)
{
	static void (*const all[]) (void) = {way_0, way_1, way_2, way_3, way_4, way_5, way_6, way_7};

	for (int i = 0; i < lengthof(all); i++)
		all[i] ();
	PG_RETURN_INT64(lengthof(all) * 100);
}

/* Contexts that hold next to nothing, and take a block each. */
static pg_noinline void
hollow_site(void)
{
	MemoryContext context = AllocSetContextCreate(TopMemoryContext, "corpus hollow", ALLOCSET_DEFAULT_SIZES);

	TAKE(context, 48);
	KEEPS_FRAME();
}

SCENARIO(hollow)
{
	for (int i = 0; i < 5; i++)
		hollow_site();
	PG_RETURN_INT64(5 * 48);
}
