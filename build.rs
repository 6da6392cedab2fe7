//! Keeps together in the library what every server process runs.

fn main() {
    println!("cargo:rerun-if-changed=hot.ld");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-T,{}/hot.ld", env!("CARGO_MANIFEST_DIR"));
}
