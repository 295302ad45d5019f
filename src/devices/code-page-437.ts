/**
 * What the character generator of a PC draws for each byte, as Unicode
 * (https://www.unicode.org/Public/MAPPINGS/VENDORS/MICSFT/PC/CP437.TXT, and for 0x01 to 0x1f and 0x7f
 * https://www.unicode.org/Public/MAPPINGS/VENDORS/MISC/IBMGRAPH.TXT). 0x00 and 0xff are blank: spaces.
 */
export const CODE_PAGE_437: readonly string[] = [
  ...' ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼',
  ...' !"#$%&\'()*+,-./0123456789:;<=>?',
  ...'@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_',
  ...'`abcdefghijklmnopqrstuvwxyz{|}~⌂',
  ...'ÇüéâäàåçêëèïîìÄÅÉæÆôöòûùÿÖÜ¢£¥₧ƒ',
  ...'áíóúñÑªº¿⌐¬½¼¡«»░▒▓│┤╡╢╖╕╣║╗╝╜╛┐',
  ...'└┴┬├─┼╞╟╚╔╩╦╠═╬╧╨╤╥╙╘╒╓╫╪┘┌█▄▌▐▀',
  ...'αßΓπΣσµτΦΘΩδ∞φε∩≡±≥≤⌠⌡÷≈°∙·√ⁿ²■ ',
]
