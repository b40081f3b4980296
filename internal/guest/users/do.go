package users

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrAborted says that the function given to [User.Do] ended its goroutine.
var ErrAborted = errors.New("function ended its goroutine")

// Do runs fn with u's file-system identity and returns its error: owner and
// group of what is made, and every permission check, are u's, made by the
// kernel. For anybody but root the thread has no effective capability at all
// meanwhile, so that neither permissions nor reserved disk blocks nor
// privileged attributes are open to it.
//
// fn runs on a goroutine and thread of its own, and Do waits for it; goroutines
// which fn starts do not have the identity. A panic in fn goes on in the
// caller. A thread whose own identity cannot be put back is thrown away.
//
// An agent that is not root can be nobody but itself: Do fails with EPERM for
// other users.
func (u User) Do(fn func() error) error {
	if os.Geteuid() == int(u.UID) && os.Getegid() == int(u.GID) {
		return fn()
	}
	done := make(chan outcome, 1)
	go func() {
		out := outcome{err: ErrAborted}
		defer func() { done <- out }()
		runtime.LockOSThread()
		back, err := assume(u)
		if err != nil {
			out.err = fmt.Errorf("act as user %s: %w", u.Name, err)
		} else {
			out = call(fn)
		}
		// A goroutine that ends while locked takes its thread with it.
		if back() == nil {
			runtime.UnlockOSThread()
		}
	}()
	out := <-done
	if out.panicked {
		panic(out.value)
	}
	return out.err
}

type outcome struct {
	err      error
	panicked bool
	value    any
}

// call runs fn and turns its panic into a value. The identity is put back by
// the caller in that case too; after a Goexit in fn it is not, and the thread
// dies.
func call(fn func() error) (out outcome) {
	defer func() {
		if v := recover(); v != nil {
			out = outcome{panicked: true, value: v}
		}
	}()
	return outcome{err: fn()}
}

// assume gives the calling thread u's identity. back undoes whatever was done,
// also after an error.
//
// The system calls are raw: those of package syscall would change every thread
// of the process.
func assume(u User) (back func() error, err error) {
	var undo []func() error
	back = func() error {
		for i := len(undo) - 1; i >= 0; i-- {
			if err := undo[i](); err != nil {
				return err
			}
		}
		return nil
	}
	if u.UID != 0 {
		old, err := unix.Getgroups()
		if err != nil {
			return back, fmt.Errorf("get groups: %w", err)
		}
		was := make([]uint32, len(old))
		for i, g := range old {
			was[i] = uint32(g)
		}
		undo = append(undo, func() error { return setgroups(was) })
		if err := setgroups(u.Groups); err != nil {
			return back, fmt.Errorf("set groups: %w", err)
		}
	}
	gid := setfs(unix.SYS_SETFSGID, u.GID)
	undo = append(undo, func() error { return setfsBack(unix.SYS_SETFSGID, gid) })
	if setfs(unix.SYS_SETFSGID, noID) != u.GID {
		return back, fmt.Errorf("set group %d: %w", u.GID, unix.EPERM)
	}
	if u.UID == 0 {
		return back, nil
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&hdr, &caps[0]); err != nil {
		return back, fmt.Errorf("get capabilities: %w", err)
	}
	uid := setfs(unix.SYS_SETFSUID, u.UID)
	undo = append(undo, func() error { return setfsBack(unix.SYS_SETFSUID, uid) })
	if setfs(unix.SYS_SETFSUID, noID) != u.UID {
		return back, fmt.Errorf("set user %d: %w", u.UID, unix.EPERM)
	}
	// setfsuid drops the capabilities that pass over file permissions. The
	// rest must go too: CAP_SYS_RESOURCE takes a file system's reserved
	// blocks, CAP_SYS_ADMIN sets trusted attributes.
	none := caps
	none[0].Effective, none[1].Effective = 0, 0
	undo = append(undo, func() error { return unix.Capset(&hdr, &caps[0]) })
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		return back, fmt.Errorf("drop capabilities: %w", err)
	}
	return back, nil
}

// noID is the id that setfsuid and setfsgid never set: with it they only tell
// the present one.
const noID = ^uint32(0)

// setfs sets the thread's file-system user or group and returns the one before.
// The kernel reports no failure; ask again with noID.
func setfs(call uintptr, id uint32) (before uint32) {
	r, _, _ := unix.RawSyscall(call, uintptr(id), 0, 0)
	return uint32(r)
}

func setfsBack(call uintptr, id uint32) error {
	setfs(call, id)
	if setfs(call, noID) != id {
		return unix.EPERM
	}
	return nil
}

func setgroups(gids []uint32) error {
	var p unsafe.Pointer
	if len(gids) > 0 {
		p = unsafe.Pointer(&gids[0])
	}
	_, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(gids)), uintptr(p), 0)
	if e != 0 {
		return e
	}
	return nil
}
