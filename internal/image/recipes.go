package image

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"slices"
)

// File is a file that a recipe puts into its image, over what is there.
type File struct {
	Path string
	// Mode is the permission bits; 0 is 0644. Files belong to root.
	Mode uint32
	Data []byte
	// Target makes it a symbolic link.
	Target string
}

// recipe is a built-in image. All of it goes into the recipe's digest, so a
// change here builds anew where the old one is.
type recipe struct {
	Description string
	// Hidden recipes are for tests and benchmarks.
	Hidden bool
	// Busybox: the image is busybox and a few files. Otherwise it is a
	// bootstrapped distribution with these packages.
	Busybox  bool
	Packages []string
	// PerDistro are packages that are called differently, by os-release's ID.
	PerDistro map[string][]string
	Config    config
	Files     []File
	// Extras are copied out of the disk: pattern of the path → file name.
	Extras map[string]string
	// Docs keeps manuals and translations.
	Docs bool
}

const (
	recipeMinimal = "minimal"
	recipeDev     = "dev"
	recipeDevFull = "dev-full"
	recipeSystemd = "systemd"
	recipeStock   = "stock"
)

var devPackages = []string{
	"bash", "ca-certificates", "curl", "git", "iproute2", "less", "procps", "python3", "sudo",
}

// userConfig is what people and agents start with: an ordinary user who may
// become root.
var userConfig = config{
	User:    "user",
	Workdir: "/home/user",
	Env: map[string]string{
		"LANG": "C.UTF-8",
		"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	},
	Cmd: []string{"/bin/bash"},
}

var rootConfig = config{
	User:    "root",
	Workdir: "/root",
	Env:     userConfig.Env,
	Cmd:     []string{"/bin/sh"},
}

// hostFiles replace what the bootstrap copies from the host, and let the user
// become root.
var hostFiles = []File{
	{Path: "etc/hostname", Data: []byte("localhost\n")},
	{Path: "etc/hosts", Data: []byte("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")},
	{Path: "etc/resolv.conf"},
	{Path: "etc/default/locale", Data: []byte("LANG=C.UTF-8\n")},
}

var sudoFile = File{Path: "etc/sudoers.d/user", Mode: 0o440, Data: []byte("user ALL=(ALL:ALL) NOPASSWD: ALL\n")}

var recipes = map[string]recipe{
	recipeMinimal: {
		Description: "busybox and nothing else, made in seconds",
		Busybox:     true,
		Config:      rootConfig,
	},
	recipeDev: {
		Description: "bash, git, curl, python3 and sudo on the host's own distribution",
		Packages:    devPackages,
		Config:      userConfig,
		Files:       append(slices.Clone(hostFiles), sudoFile),
	},
	recipeDevFull: {
		Description: "dev with node, npm, compilers and the usual command-line tools",
		Packages: append(slices.Clone(devPackages), "build-essential", "file", "jq", "nodejs", "npm", "openssh-client", "python3-dev",
			"python3-pip", "python3-venv", "ripgrep", "rsync", "sqlite3", "tree", "unzip", "wget", "xz-utils", "zip"),
		Config: userConfig,
		Files:  append(slices.Clone(hostFiles), sudoFile),
	},
	recipeSystemd: {
		Description: "a distribution with systemd as init",
		Hidden:      true,
		Packages:    []string{"dbus", "iproute2", "kmod", "procps", "systemd-sysv", "udev"},
		Config:      rootConfig,
		Files:       hostFiles,
	},
	recipeStock: {
		Description: "systemd with the distribution's own kernel and initramfs",
		Hidden:      true,
		Packages:    []string{"dbus", "initramfs-tools", "iproute2", "kmod", "procps", "systemd-sysv", "udev", "zstd"},
		PerDistro: map[string][]string{
			"debian": {"linux-image-cloud-amd64"},
			"ubuntu": {"linux-image-virtual"},
		},
		Config: rootConfig,
		Files:  hostFiles,
		Extras: map[string]string{"boot/vmlinuz-*": "vmlinuz", "boot/initrd.img-*": "initrd.img"},
	},
}

// Recipes lists the names of the built-in images that are for users.
func Recipes() []string {
	var names []string
	for name, r := range recipes {
		if !r.Hidden {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// digest names what the recipe makes on this host, as far as that can be known
// beforehand: the same digest, the same packages of the same suite.
func (r recipe) digest(d distro, tool string) string {
	text, err := json.Marshal(struct {
		Format int
		Recipe recipe
		Suite  string
		Tool   string
	}{formatVersion, r, d.ID + " " + d.Codename, tool})
	if err != nil {
		panic(err) // strings, maps and slices of them
	}
	sum := sha256.Sum256(text)
	return digestPrefix + hex.EncodeToString(sum[:])
}

// packages lists what to install on d.
func (r recipe) packages(d distro) []string {
	return append(slices.Clone(r.Packages), r.PerDistro[d.ID]...)
}

// extras lists the files that the recipe copies out of the disk.
func (r recipe) extras() []string { return slices.Sorted(maps.Values(r.Extras)) }
