//! Text between the server, which keeps it in the encoding of the database, and Rust, where it is UTF-8. pgrx passes the
//! bytes as they are, which is right where the database is UTF8 too.

use std::borrow::Cow;
use std::fmt::Write;

use pgrx::callconv::{Arg, ArgAbi, BoxRet, FcInfo};
use pgrx::nullable::Nullable;
use pgrx::pgrx_sql_entity_graph::metadata::{
    ArgumentError, ReturnsError, ReturnsRef, SqlMappingRef, SqlTranslatable, TypeOrigin,
};
use pgrx::{FromDatum, IntoDatum, PgSqlErrorCode, pg_sys};

/// A `text`: as an argument, as a column, and in SQL of our own.
#[derive(Clone, Debug)]
pub struct Text(pub String);

/// A `jsonb` that is returned.
pub struct Document(pub serde_json::Value);

impl<T: Into<String>> From<T> for Text {
    fn from(text: T) -> Self {
        Text(text.into())
    }
}

/// Whether the bytes of UTF-8 are those of the database. In SQL_ASCII they are what the client makes of them.
fn keeps_utf8() -> bool {
    // SAFETY: returns a variable of the server.
    matches!(unsafe { pg_sys::GetDatabaseEncoding() } as u32, pg_sys::pg_enc::PG_UTF8 | pg_sys::pg_enc::PG_SQL_ASCII)
}

/// An argument or a value of a table. ERROR: it is in no encoding that can be told.
fn from_server(bytes: &[u8]) -> String {
    if bytes.is_ascii() || keeps_utf8() {
        return std::str::from_utf8(bytes).map(str::to_string).unwrap_or_else(|_| {
            super::refuse(
                PgSqlErrorCode::ERRCODE_CHARACTER_NOT_IN_REPERTOIRE,
                "the text is not valid UTF-8".into(),
                "A database of the encoding SQL_ASCII does not say what its bytes mean; rheap takes them for UTF-8.",
            )
        });
    }
    // SAFETY: the server's function reads so many bytes, and returns them or a new C string of UTF-8.
    unsafe {
        let converted =
            pg_sys::pg_server_to_any(bytes.as_ptr().cast(), bytes.len() as i32, pg_sys::pg_enc::PG_UTF8 as i32);
        core::ffi::CStr::from_ptr(converted).to_string_lossy().into_owned()
    }
}

/// Pieces of this size are converted one by one, into a buffer that holds the longest outcome.
const PIECE: usize = 8192;

/// In the encoding of the database. What that does not have becomes `\u{…}`, with such a backslash.
pub fn to_server<'a>(text: &'a str, backslash: &str) -> Cow<'a, [u8]> {
    if text.is_ascii() || keeps_utf8() {
        return Cow::Borrowed(text.as_bytes());
    }
    const UTF8: i32 = pg_sys::pg_enc::PG_UTF8 as i32;
    // SAFETY: a variable of the server, and a look-up in its catalogs.
    let (encoding, conversion) = unsafe {
        let encoding = pg_sys::GetDatabaseEncoding();
        (encoding, pg_sys::FindDefaultConversionProc(UTF8, encoding))
    };
    let mut out = Vec::with_capacity(text.len());
    let mut buffer = vec![0u8; 4 * PIECE + 16];
    let mut rest = text;
    while !rest.is_empty() {
        let mut length = rest.len().min(PIECE);
        while !rest.is_char_boundary(length) {
            length -= 1;
        }
        let mut taken = 0;
        if conversion != pg_sys::InvalidOid {
            // SAFETY: reads `length` bytes and writes a C string of at most four times as many; without errors it
            // returns how many it could convert.
            taken = unsafe {
                pg_sys::pg_do_encoding_conversion_buf(
                    conversion,
                    UTF8,
                    encoding,
                    rest.as_ptr().cast_mut(),
                    length as i32,
                    buffer.as_mut_ptr(),
                    buffer.len() as i32,
                    true,
                )
            } as usize;
            out.extend(buffer.iter().take_while(|&&byte| byte != 0));
        }
        rest = &rest[taken..];
        if taken < length
            && let Some(c) = rest.chars().next()
        {
            match c.is_ascii() {
                true => out.push(c as u8),
                false => out.extend(escaped(c, backslash).into_bytes()),
            }
            rest = &rest[c.len_utf8()..];
        }
    }
    Cow::Owned(out)
}

fn escaped(c: char, backslash: &str) -> String {
    format!("{backslash}u{{{:x}}}", c as u32)
}

/// For messages, which pgrx keeps as UTF-8: in ASCII, where the database is of another encoding.
pub fn for_message(text: String) -> String {
    if text.is_ascii() || keeps_utf8() {
        return text;
    }
    text.chars().map(|c| if c.is_ascii() { c.to_string() } else { escaped(c, "\\") }).collect()
}

/// A name for SQL that is written here, in ASCII whatever is in it.
pub fn identifier(name: &str) -> String {
    let mut quoted = String::from(if name.is_ascii() { "\"" } else { "U&\"" });
    for c in name.chars() {
        match c {
            '"' => quoted.push_str("\"\""),
            '\\' if !name.is_ascii() => quoted.push_str("\\\\"),
            c if c.is_ascii() => quoted.push(c),
            c => drop(write!(quoted, "\\+{:06x}", c as u32)),
        }
    }
    quoted.push('"');
    quoted
}

impl FromDatum for Text {
    unsafe fn from_polymorphic_datum(datum: pg_sys::Datum, is_null: bool, _: pg_sys::Oid) -> Option<Self> {
        if is_null {
            return None;
        }
        // SAFETY: the caller says that it is a text; its bytes are copied.
        let bytes = unsafe {
            let plain = pg_sys::pg_detoast_datum_packed(datum.cast_mut_ptr());
            pgrx::varlena_to_byte_slice(plain)
        };
        Some(Text(from_server(bytes)))
    }
}

impl IntoDatum for Text {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        let bytes = to_server(&self.0, "\\");
        super::require(bytes.len());
        bytes.as_ref().into_datum()
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::TEXTOID
    }
}

impl IntoDatum for Document {
    fn into_datum(self) -> Option<pg_sys::Datum> {
        // Non-ASCII characters stand in strings only, where a backslash is written as two.
        // Declared here: the bindings' wrappers would copy an error that is raised because there is no memory.
        unsafe extern "C-unwind" {
            fn DirectFunctionCall1Coll(
                function: unsafe extern "C-unwind" fn(pg_sys::FunctionCallInfo) -> pg_sys::Datum,
                collation: pg_sys::Oid,
                argument: pg_sys::Datum,
            ) -> pg_sys::Datum;
            fn jsonb_in(call: pg_sys::FunctionCallInfo) -> pg_sys::Datum;
        }
        let text = {
            let json = self.0.to_string();
            let json = to_server(&json, "\\\\");
            super::require(json.len());
            // SAFETY: one byte more is zero, and JSON escapes zero bytes: a C string.
            unsafe {
                let text = pg_sys::palloc0(json.len() + 1).cast::<u8>();
                text.copy_from_nonoverlapping(json.as_ptr(), json.len());
                text
            }
        };
        drop(self);
        // SAFETY: the server's input function reads a C string. If it raises an error, nothing of ours is left.
        unsafe { Some(DirectFunctionCall1Coll(jsonb_in, pg_sys::InvalidOid, text.into())) }
    }

    fn type_oid() -> pg_sys::Oid {
        pg_sys::JSONBOID
    }
}

// SAFETY: a text or NULL comes in.
unsafe impl<'fcx> ArgAbi<'fcx> for Text {
    unsafe fn unbox_arg_unchecked(arg: Arg<'_, 'fcx>) -> Self {
        // SAFETY: the caller's promise.
        unsafe { arg.unbox_arg_using_from_datum() }.expect("a function that takes no NULL is strict")
    }

    unsafe fn unbox_nullable_arg(arg: Arg<'_, 'fcx>) -> Nullable<Self> {
        // SAFETY: the caller's promise.
        unsafe { arg.unbox_arg_using_from_datum().into() }
    }
}

macro_rules! returned {
    ($kind:ty, $name:literal) => {
        // SAFETY: a datum of the type that SQL is told.
        unsafe impl BoxRet for $kind {
            unsafe fn box_into<'fcx>(self, fcinfo: &mut FcInfo<'fcx>) -> pgrx::datum::Datum<'fcx> {
                match self.into_datum() {
                    // SAFETY: as above.
                    Some(datum) => unsafe { fcinfo.return_raw_datum(datum) },
                    None => fcinfo.return_null(),
                }
            }
        }
        // SAFETY: the server's own type of this name.
        unsafe impl SqlTranslatable for $kind {
            const TYPE_IDENT: &'static str = pgrx::pgrx_resolved_type!($kind);
            const TYPE_ORIGIN: TypeOrigin = TypeOrigin::External;
            const ARGUMENT_SQL: Result<SqlMappingRef, ArgumentError> = Ok(SqlMappingRef::literal($name));
            const RETURN_SQL: Result<ReturnsRef, ReturnsError> = Ok(ReturnsRef::One(SqlMappingRef::literal($name)));
        }
    };
}

returned!(Text, "TEXT");
returned!(Document, "jsonb");

#[cfg(test)]
mod tests {
    use super::identifier;

    #[test]
    fn a_name_is_quoted_in_ascii() {
        assert_eq!(identifier("public"), "\"public\"");
        assert_eq!(identifier("a\"b\\"), "\"a\"\"b\\\"");
        assert_eq!(identifier("gr\u{f6}\u{df}e\\\u{1f600}"), "U&\"gr\\+0000f6\\+0000dfe\\\\\\+01f600\"");
    }
}
