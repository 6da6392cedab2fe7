//! Keeps together in the library what every server process runs, and what it needs for a panic inside it: each library
//! more that a server has loaded costs every new process some page faults and mappings.

fn main() {
    println!("cargo:rerun-if-changed=hot.ld");
    println!("cargo:rustc-link-lib=static:-bundle=gcc_eh");
    // A copy: clones that share a target folder share this answer too, and the one that gave it may be gone.
    let script = std::path::Path::new(&std::env::var_os("OUT_DIR").unwrap()).join("hot.ld");
    std::fs::copy("hot.ld", &script).unwrap();
    println!("cargo:rustc-cdylib-link-arg=-Wl,-T,{}", script.display());
}
