// SPDX-License-Identifier: GPL-2.0
//! Live update sessions, as in <linux/liveupdate.h>, and kexec.

use std::fs::File;
use std::io::{Error, Result};
use std::os::fd::{AsRawFd, FromRawFd};

use nix::libc::{c_long, ioctl, syscall, SYS_kexec_file_load};

pub const CREATE_SESSION: u64 = 0xba00;
pub const RETRIEVE_SESSION: u64 = 0xba01;
const PRESERVE_FD: u64 = 0xba40;
const RETRIEVE_FD: u64 = 0xba41;
const FINISH: u64 = 0xba42;

/// What a request takes: the size of this, a file, and the name of a session or a token.
#[repr(C)]
struct Argument {
    size: u32,
    fd: i32,
    name: [u8; 64],
}

fn check(ret: c_long) -> Result<()> {
    if ret == 0 {
        return Ok(());
    }
    Err(Error::last_os_error())
}

/// Makes a request with the first `size` bytes of an argument; returns the file in it.
fn request(to: &File, number: u64, size: u32, fd: i32, name: &[u8]) -> Result<i32> {
    let mut arg = Argument {
        size,
        fd,
        name: [0; 64],
    };
    arg.name[..name.len()].copy_from_slice(name);
    // SAFETY: the kernel uses as much of `arg` as that says.
    check(unsafe { ioctl(to.as_raw_fd(), number, &mut arg) }.into())?;
    Ok(arg.fd)
}

pub struct Session(File);

impl Session {
    /// CREATE_SESSION or RETRIEVE_SESSION.
    pub fn open(number: u64, name: &str) -> Result<Self> {
        let luo = File::options()
            .read(true)
            .write(true)
            .open("/dev/liveupdate")?;
        let fd = request(&luo, number, 72, 0, name.as_bytes())?;
        // SAFETY: the kernel made this file for us.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    pub fn preserve(&self, file: &File, token: u64) -> Result<()> {
        request(
            &self.0,
            PRESERVE_FD,
            16,
            file.as_raw_fd(),
            &token.to_ne_bytes(),
        )?;
        Ok(())
    }

    pub fn retrieve(&self, token: u64) -> Result<File> {
        let fd = request(&self.0, RETRIEVE_FD, 16, 0, &token.to_ne_bytes())?;
        // SAFETY: the kernel made this file for us.
        Ok(unsafe { File::from_raw_fd(fd) })
    }

    pub fn finish(self) -> Result<()> {
        request(&self.0, FINISH, 8, 0, &[])?;
        Ok(())
    }
}

/// Loads a kernel, to be started by `reboot()`.
pub fn load_kernel(image: &File, initrd: &File, args: &str) -> Result<()> {
    let args = format!("{}\0", args.trim_end());
    let (image, initrd) = (image.as_raw_fd(), initrd.as_raw_fd());
    // SAFETY: the kernel reads so many bytes of `args`, the last of which is 0.
    check(unsafe {
        syscall(
            SYS_kexec_file_load,
            image,
            initrd,
            args.len(),
            args.as_ptr(),
            0u64,
        )
    })
}
