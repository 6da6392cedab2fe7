//! Keeps together in the library what every server process runs, and what it needs for a panic inside it: each library
//! more that a server has loaded costs every new process some page faults and mappings.

fn main() {
    println!("cargo:rerun-if-changed=hot.ld");
    println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-T,{}/hot.ld", env!("CARGO_MANIFEST_DIR"));
}
